"""gguf.py: a GGUF file and a folder of one network agree; the wheel's rows are put back; what bad files get."""

import os
import struct
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
import torch
from networks import llama, load, permuted, refusal, same_logits, save, write_gguf

from lib.official import find_release
from lib.tokenizer import gguf_tokenizer_json, tokenizer_json
from lib.weights import release_config, release_tensors


@pytest.mark.parametrize("kind, tolerance", [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", None)])
def test_gguf_and_safetensors_of_one_network_agree(kind, tolerance, tmp_path):
    network = llama()
    folder = find_release(str(save(tmp_path / "folder", network)))
    file = find_release(write_gguf(tmp_path / "file.gguf", network, kind))
    assert file.source == "file" and list(file.sha256) == ["file.gguf"]
    ours, expected = release_config(file), release_config(folder)
    assert asdict(ours) | {"initializer_range": 0} == asdict(expected) | {"initializer_range": 0}
    tensors, exact = release_tensors(file), release_tensors(folder)
    assert tensors.keys() == exact.keys()
    for name, tensor in tensors.items():
        if tolerance is None and tensor.dim() == 2:  # Q8_0: steps of a 127th of the largest of 32 neighbours
            step = exact[name].unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            difference = (tensor - exact[name]).unflatten(-1, (-1, 32)).abs()
            assert (difference <= 0.6 * step).all(), name  # half a step, and the step itself is fp16
        else:
            torch.testing.assert_close(tensor, exact[name], rtol=tolerance or 0, atol=1e-7 if tolerance else 0)
    if kind == "F32":
        same_logits(file, network)


def test_the_wheel_is_smollm2_and_its_rows_are_put_back(release, real_model, real_ids):
    tensors = release_tensors(release)
    assert len(tensors) == 272 and sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    idx, targets = real_ids[None, :2_048], real_ids[None, 1:2_049]
    with torch.no_grad():
        assert real_model(idx, targets) < 2.6
    config = real_model.config
    for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        for key in [key for key in tensors if name in key]:
            tensors[key] = permuted(tensors[key], heads)  # as the file has them
    idx, targets = idx[:, :256], targets[:, :256]
    with torch.no_grad():
        right, wrong = real_model(idx, targets), torch.func.functional_call(real_model, tensors, (idx, targets))
    assert wrong > right + 2, (wrong, right)


@pytest.mark.parametrize("part", [0, 3, 50, 400, 2_000, 0.3, 0.9, 0.999])
def test_a_cut_gguf_gets_one_line(part, tmp_path):
    path = Path(write_gguf(tmp_path / "cut.gguf", llama()))
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    assert "cut.gguf is not a whole GGUF file" in refusal(lambda: load(path))


@pytest.mark.parametrize("changes, words", [
    (dict(without=["block_count"]), ["llama.block_count"]),
    (dict(header={"block_count": 1}), ["contradict its config", "layers.1"]),
    (dict(header={"rope_scaling_type": gguf.RopeScalingType.YARN}), ["rope_scaling", "yarn"]),
    (dict(extra=[("output.weight", torch.zeros(96, 64))]), ["tie_word_embeddings = False"]),
    (dict(extra=[("rope_freqs.weight", torch.ones(16))]), ["contradict its config", "rope_freqs"]),
    (dict(extra=[("blk.0.attn_q.bias", torch.ones(128))]), ["contradict its config", "attn_q.bias"]),
])  # fmt: skip
def test_another_gguf_gets_one_line(changes, words, tmp_path):
    path = write_gguf(tmp_path / "other.gguf", llama(), **changes)
    message = refusal(lambda: load(path))
    for word in words:
        assert word in message, (word, message)


def test_a_gguf_with_no_scaling_says_so(tmp_path):
    path = write_gguf(tmp_path / "plain.gguf", llama(), header={"rope_scaling_type": gguf.RopeScalingType.NONE})
    same_logits(find_release(path), llama())


def test_a_gguf_without_the_tokenizer_gets_one_line(tmp_path):
    path = write_gguf(tmp_path / "bare.gguf", llama())
    assert "bare.gguf does not hold the tokenizer of SmolLM2" in refusal(tokenizer_json, path)


def patched(content, at, form, *values):
    return content[:at] + struct.pack(form, *values) + content[at + struct.calcsize(form) :]


def text(string):
    return struct.pack("<Q", len(string)) + string


HOSTILE = {  # a GGUF begins with its magic, its version, the count of its tensors and that of its fields
    "tensors": lambda b, tensor: patched(b, 8, "<Q", 2**60),
    "fields": lambda b, tensor: patched(b, 16, "<Q", 2**60),
    "a long key": lambda b, tensor: patched(b, 24, "<Q", 2**60),
    "a key that wraps around": lambda b, tensor: patched(b, 24, "<Q", 2**64 - 8),
    "version": lambda b, tensor: patched(b, 4, "<I", 77),
    "dimensions": lambda b, tensor: patched(b, tensor, "<I", 2**31),
    "five dimensions": lambda b, tensor: patched(b, tensor, "<I", 5),
    "a long dimension": lambda b, tensor: patched(b, tensor + 4, "<Q", 2**60),
    "dimensions that wrap around": lambda b, tensor: patched(b, tensor + 4, "<QQ", 2**40, 2**40),
    "a far tensor": lambda b, tensor: patched(b, tensor + 24, "<Q", 2**62),
    "unknown type": lambda b, tensor: patched(b, tensor + 20, "<I", 999),
    "an endless array": lambda b, tensor: b[:24] + text(b"a") + struct.pack("<IIQ", 9, 0, 2**60) + b[24:],
    "endless strings": lambda b, tensor: b[:24] + text(b"a") + struct.pack("<IIQ", 9, 8, 2**60) + b[24:],
    "arrays of arrays": lambda b, tensor: b[:24] + text(b"a") + struct.pack("<IIQ", 9, 9, 2**60) + b[24:],
    "a field twice": lambda b, tensor: patched(b, 16, "<Q", 2) + 2 * (text(b"a") + struct.pack("<IB", 0, 1)) + b[24:],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_header_gets_one_line_at_once(how, tmp_path):
    path = Path(write_gguf(tmp_path / "hostile.gguf", llama()))
    content = path.read_bytes()
    tensor = content.index(b"token_embd.weight") + len(b"token_embd.weight")  # n_dims, dims, type, offset come next
    path.write_bytes(HOSTILE[how](content, tensor))
    assert "hostile.gguf is not a whole GGUF file" in refusal(lambda: load(path))


def test_a_string_that_is_not_text_gets_one_line(tmp_path):
    path = Path(write_gguf(tmp_path / "odd.gguf", llama()))
    path.write_bytes(path.read_bytes().replace(text(b"llama"), text(b"ll\xe3ma")))
    assert "odd.gguf has a damaged general.architecture" in refusal(lambda: load(path))


def test_a_pipe_or_a_folder_for_a_gguf_gets_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    save(tmp_path / "folder.gguf")
    for name in ("pipe.gguf", "folder.gguf"):
        assert f"{name} is not a file" in refusal(lambda name=name: load(tmp_path / name))
        assert f"{name} is not a file" in refusal(gguf_tokenizer_json, tmp_path / name)


@pytest.mark.parametrize("header, word", [
    ({"head_count": 0}, "num_attention_heads is 0"),
    ({"head_count_kv": [2, 2]}, "num_key_value_heads is [2, 2]"),
    ({"block_count": 2**30}, "num_hidden_layers is 1073741824"),
    ({"layer_norm_rms_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rope_dimension_count": 3}, "head_dim (3) must be even"),
    ({"rope_dimension_count": 64}, "contradict its config"),
])  # fmt: skip
def test_numbers_that_describe_no_network_get_one_line(header, word, tmp_path):
    assert word in refusal(lambda: load(write_gguf(tmp_path / "odd.gguf", llama(), header=header)))
