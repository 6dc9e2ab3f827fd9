"""lib/gguf.py: a GGUF file and a folder of one model agree; the wheel's row order is undone; bad files are refused."""

from dataclasses import asdict

import gguf
import pytest
import torch
from networks import assert_same_logits, llama, load, permute, refusal, save, write_gguf
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import lib.gguf as gguf_py
from lib.tokenizer import load_tokenizer
from lib.weights import find_weights
from model import ModelConfig


def test_gguf_and_safetensors_of_one_model_agree(tmp_path):
    model = llama()
    folder = find_weights(str(save(tmp_path / "folder", model)))
    file = find_weights(write_gguf(tmp_path / "file.gguf", model))
    assert file.source == "file" and list(file.files) == ["file.gguf"]
    ours, expected = file.config, folder.config
    assert asdict(ours) | {"initializer_range": 0} == asdict(expected) | {"initializer_range": 0}
    tensors, exact = file.read(), folder.read()
    assert tensors.keys() == exact.keys()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in tensors.items())
    assert_same_logits(file, model)


def test_the_wheel_is_smollm2_and_its_row_order_is_undone(release, real_model, real_ids):
    tensors = release.read()
    assert len(tensors) == 272 and sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    idx, targets = real_ids[None, :2_048], real_ids[None, 1:2_049]
    with torch.no_grad():
        assert real_model(idx, targets) < 2.6
    config = real_model.config
    for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        for key in [key for key in tensors if name in key]:
            tensors[key] = permute(tensors[key], heads)  # as the file has them
    idx, targets = idx[:, :256], targets[:, :256]
    with torch.no_grad():
        right, wrong = real_model(idx, targets), torch.func.functional_call(real_model, tensors, (idx, targets))
    assert wrong > right + 2, (wrong, right)


def tiny_tokenizer(n):
    """Return the parts of a tokenizer.json that a GGUF needs, with n tokens."""
    vocab = {f"t{i}": i for i in range(n)}
    special = [{"id": 0, "content": "t0", "special": True}, {"id": 1, "content": "t1", "special": False}]
    return {"added_tokens": special, "model": {"vocab": vocab, "merges": [["t2", "t3"], "t4 t5"]}}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_files_equal_the_converters(kind, tmp_path):
    """Byte for byte in every tensor; and transformers' own reader restores the row order."""
    model = llama()
    config = find_weights(str(save(tmp_path / "folder", model))).config
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    ids = dict(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=3)
    ours, theirs = str(tmp_path / "ours.gguf"), write_gguf(tmp_path / "theirs.gguf", model, kind)
    gguf_py.write_gguf(ours, config, weights, kind, tiny_tokenizer(90), ids, "{{ messages }}", "a name", "and more")
    stored = [{t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(f).tensors} for f in (ours, theirs)]
    assert stored[0] == stored[1]
    header = {name: field.contents() for name, field in gguf.GGUFReader(ours).fields.items()}
    for name, field in gguf.GGUFReader(theirs).fields.items():
        assert name.startswith("GGUF.") or header[name] == field.contents(), name
    assert header["llama.attention.key_length"] == header["llama.attention.value_length"] == 32
    assert header["general.file_type"] == gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")]
    assert header["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(90)] + [f"[PAD{i}]" for i in range(90, 96)]
    assert header["tokenizer.ggml.token_type"] == [3, 4] + 88 * [1] + 6 * [5]
    assert header["tokenizer.ggml.merges"] == ["t2 t3", "t4 t5"]
    assert [header[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")] == [1, 2, 3, 0]
    assert (header["general.name"], header["tokenizer.chat_template"]) == ("a name", "{{ messages }}")
    found = load_gguf_checkpoint(ours, return_tensors=True, model_to_load=model)["tensors"]
    for name, tensor in find_weights(ours).read().items():
        assert torch.equal(tensor, torch.as_tensor(found[name]).float()), name


def test_rows_that_no_block_fits_get_one_line(tmp_path):
    config = ModelConfig(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96)
    weights = {"model.embed_tokens.weight": torch.zeros(96, 40)}
    args = (config, weights, "Q8_0", tiny_tokenizer(96), {}, "", "", "")
    message = refusal(gguf_py.write_gguf, str(tmp_path / "a.gguf"), *args)
    assert "model.embed_tokens.weight has rows of 40 values, but Q8_0 stores 32 at a time" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes, words", [
    (dict(without=["block_count"]), "has no llama.block_count"),
    (dict(without=["vocab_size"]), "has no tokenizer.ggml.tokens"),
    (dict(header={"block_count": 1}), "contradict its config"),
    (dict(header={"rope_scaling_type": gguf.RopeScalingType.YARN}), "rope_scaling = {'type': 'yarn'}"),
    (dict(extra=[("output.weight", torch.zeros(96, 64))]), "tie_word_embeddings = False"),
    (dict(extra=[("rope_freqs.weight", torch.ones(16))]), "rope_freqs"),
    (dict(extra=[("blk.0.attn_q.bias", torch.ones(128))]), "attn_q.bias"),
    (dict(header={"head_count": 0}), "num_attention_heads is 0"),
    (dict(header={"head_count_kv": [2, 2]}), "num_key_value_heads is [2, 2]"),
    (dict(header={"layer_norm_rms_eps": float("nan")}), "rms_norm_eps is nan"),
    (dict(header={"rope_dimension_count": 3}), "head_dim (3) must be even"),
    (dict(header={"rope_dimension_count": 64}), "contradict its config"),
])  # fmt: skip
def test_an_unsupported_gguf_gets_one_line(changes, words, tmp_path):
    path = write_gguf(tmp_path / "other.gguf", llama(), **changes)
    message = refusal(lambda: load(path))
    assert words in message, message


def test_absent_header_keys_have_llama_cpps_defaults(tmp_path):
    """They are in src/llama-model.cpp, and equal transformers' own for a config without them."""
    path = write_gguf(tmp_path / "plain.gguf", llama(), header={"rope_scaling_type": gguf.RopeScalingType.NONE})
    assert_same_logits(path, llama())
    assert "plain.gguf has no tokenizer.ggml.tokens in its header" in refusal(lambda: load_tokenizer(path))
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    model = llama(num_key_value_heads=4, head_dim=16, rope_parameters=rope)
    names = ["head_count_kv", "rope_freq_base", "rope_dimension_count", "vocab_size"]
    header = {"token_list": [f"t{i}" for i in range(96)], "token_types": 96 * [1], "token_merges": ["t1 t2"]}
    path = write_gguf(tmp_path / "a.gguf", model, without=names, header=header)
    assert_same_logits(path, model)
    assert "a.gguf has no tokenizer.ggml.pre in its header" in refusal(lambda: load_tokenizer(path))
    other = write_gguf(tmp_path / "b.gguf", model, header=header | {"tokenizer_pre": "gpt-2"})
    assert "b.gguf has tokenizer.ggml.pre = 'gpt-2', not 'smollm'" in refusal(lambda: load_tokenizer(other))
    wide = llama()  # heads of 32, where hidden_size / heads is 16
    assert_same_logits(write_gguf(tmp_path / "c.gguf", wide, without=names[2:3], header={"key_length": 32}), wide)
