"""
Test verify.py: correct models pass; every fault fails, and its row names it. Most tests use only the first four of the
real layers, to be fast. Two tests verify the full model.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import llama, permute, save, save_checkpoint, tiny, write_gguf
from safetensors.torch import save_file

import model as model_py
import verify
from lib.checkpoint import read_checkpoint, write_checkpoint
from lib.weights import build, config_to_json, find_weights
from model import SmolLM2
from verify import VerifyConfig


@pytest.fixture
def run(capsys):
    """Return a function that runs verify.py with settings: (True if a check failed, its output, its rows by name)."""

    def run(**settings):
        settings = {name: value if isinstance(value, int) else str(value) for name, value in settings.items()}
        try:
            checklist = verify.run_checks(VerifyConfig(**{"tokens": 64} | settings))
        except SystemExit as stop:
            assert stop.code.startswith("error: ") and "\n" not in stop.code
            return True, capsys.readouterr().out + stop.code, {}
        out = capsys.readouterr().out
        table = [line for line in out.splitlines() if line.startswith(("✓", "✗", "skipped"))]
        assert len(table) == len(checklist.rows) and max(map(len, table)) <= 100
        return checklist.count("✗") > 0, out, checklist.rows

    return run


def names(rows, result):
    return [name for name, row in rows.items() if row.result == result]


def write_folder(path, config, tensors):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_to_json(config)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def cut_out(real_model, vocab_size, layers=4):
    """Return (config, tensors) of the real model's first layers and first tokens, in bf16."""
    config = replace(real_model.config, num_hidden_layers=layers, vocab_size=vocab_size, max_position_embeddings=512)
    tensors = {name: real_model.state_dict()[name] for name in SmolLM2(config).state_dict()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:vocab_size]
    return config, {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def small_model(real_model, tmp_path_factory):
    """Return (config, tensors, folder) of a small reference."""
    config, tensors = cut_out(real_model, 2_048)
    return config, tensors, write_folder(tmp_path_factory.mktemp("reference") / "small", config, tensors)


# ---- model.py against transformers
def test_the_real_weights(run):
    failed, out, rows = run(quick=True, tokens=2_048)
    assert not failed
    assert names(rows, "skipped") == ["every value, bit for bit", "greedy ids after [22007, 6463, 314]"]
    assert "134,515,008" in out and "Q4_1" in out and "28 ✓, 0 ✗, 2 skipped" in out
    for name, measured in {
        "embed_tokens": "[49152, 576]", "q_proj": "[576, 576] (9 heads)", "k_proj": "[192, 576] (3 KV heads)",
        "biases": "0", "head": "no lm_head", "greedy text, 8 tokens": "the first 8 match",
    }.items():  # fmt: skip
        assert rows[name].measured == measured


def test_a_wrong_model_py_is_caught(run, small_model, monkeypatch):
    assert not run(init_from=small_model[2])[0]
    rotate = model_py.rotate
    monkeypatch.setattr(model_py, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    failed, _, rows = run(init_from=small_model[2])
    assert failed and rows["hidden states, 4 layers (relative)"].measured == "first wrong at layer 0"
    assert {"logits at all 64 positions", "argmax token", "mean NLL, nats per token (relative)"} <= {*names(rows, "✗")}


def test_a_broken_cache_is_caught(run, small_model, monkeypatch):
    append = model_py.KVCache.append

    def late(self, k, v):  # the newest key is replaced by the one before
        k, v = append(self, k, v)
        return k.roll(1, dims=2), v

    monkeypatch.setattr(model_py.KVCache, "append", late)
    failed, _, rows = run(init_from=small_model[2], tokens=512)
    assert failed and {"cached decoding from position 496", "greedy text, 16 tokens"} <= set(names(rows, "✗"))


def test_a_control_that_passes_is_caught(run, tmp_path):
    """With std 0.02, as before training, the logits hardly depend on theta."""
    model = llama(max_position_embeddings=512)
    for p in model.parameters():
        p.data.mul_(0.1 if p.dim() > 1 else 1.0)
    failed, _, rows = run(init_from=save(tmp_path / "small", model))
    row = rows["rope_theta 2,000"]
    assert failed and row.result == "✗" and row.measured.startswith("passes") and "too small" in row.measured


def test_without_transformers(run, small_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    failed, out, _ = run(init_from=small_model[2])
    assert failed and out.endswith("transformers, which is not installed: pip install transformers")


def test_the_rows_of_the_official_base(run, real_model, tmp_path, monkeypatch):
    """Check the rows that need the official base release, on a small model that pretends to be it."""
    folder = write_folder(tmp_path / "base", *cut_out(real_model, 49_152))
    greedy = "greedy ids after [22007, 6463, 314]"
    failed, out, rows = run(init_from=folder)
    assert not failed and rows["every value, bit for bit"].measured == "38 of 38"
    assert rows["tensor types"].measured == "38 BF16"
    assert rows[greedy].result == rows["sha256 of model.safetensors"].result == "skipped"
    assert "64 tokens of Python's reference manual" in out

    digest, _ = find_weights(str(folder)).files["model.safetensors"]
    monkeypatch.setattr(verify, "BASE_SHA256", digest)
    failed, _, rows = run(init_from=folder)  # the small model continues the prompt differently
    assert failed and names(rows, "✗") == [greedy]
    monkeypatch.setattr(verify, "CONTINUATION", json.loads(rows[greedy].measured))
    assert not run(init_from=folder)[0]

    load_model = verify.load_model

    def load_changed(source):
        model = load_model(source)
        model.model.layers[3].mlp.up_proj.weight.view(torch.int32)[5, 7] ^= 1  # the last bit of one value
        return model

    monkeypatch.setattr(verify, "load_model", load_changed)
    failed, _, rows = run(init_from=folder)
    assert failed and names(rows, "✗") == ["every value, bit for bit"]
    assert rows["every value, bit for bit"].notes == ["model.layers.3.mlp.up_proj.weight"]


@pytest.mark.parametrize("changes", [
    dict(hidden_size=72, num_attention_heads=3, num_key_value_heads=3),
    dict(hidden_size=40, num_attention_heads=8, head_dim=18, rms_norm_eps=1e-4),
    dict(num_key_value_heads=1, rms_norm_eps=1e-3, sharded=True),
])  # fmt: skip
def test_folders_that_transformers_wrote(run, tmp_path, changes):
    shards = dict(max_shard_size="100KB") if changes.pop("sharded", False) else {}
    model = llama(vocab_size=512, max_position_embeddings=512, **changes)
    folder = save(tmp_path / "llama", model, **shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(shards)
    failed, out, rows = run(init_from=folder, tokens=512)
    assert not failed and "on 512 random ids" in out, out
    assert rows["greedy text, 16 tokens"].result == rows["every value, bit for bit"].result == "✓"
    grouped = 1 < model.config.num_key_value_heads < model.config.num_attention_heads
    assert (rows["tiled KV heads"].result == "skipped") == (not grouped)


# ---- Copies
def test_sound_copies_pass(run, small_model, tmp_path):
    """Check that each copy is as good as its type allows."""
    config, tensors, _ = small_model
    torch.manual_seed(0)  # noise of 1 %: without it, values from a Q4_1 file fit Q4_1 exactly
    tensors = {n: (t.float() * (1 + 0.01 * torch.randn(t.shape))).bfloat16() for n, t in tensors.items()}
    model = build(config, tensors)
    save_checkpoint(tmp_path, model)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    copies = [(tmp_path / "ckpt.pt", "F32"), (write_folder(tmp_path / "head", config, tensors | head), "BF16")]
    for dtype, kind in verify.TYPE_NAMES.items():
        copies.append((write_folder(tmp_path / kind, config, {n: t.to(dtype) for n, t in tensors.items()}), kind))
    for kind in ("F32", "Q8_0", "Q4_1", "MXFP4"):  # the gguf package does not write the K types
        copies.append((write_gguf(tmp_path / f"{kind}.gguf", model, kind), kind))
    for path, kind in copies:
        failed, out, rows = run(init_from=path, against=tmp_path / "BF16")
        assert not failed and not names(rows, "skipped"), out
        tolerance = verify.TOLERANCES["F32" if kind == "BF16" else kind]  # the reference is bf16 too: no rounding
        assert float(rows["hidden states, 4 layers (relative)"].bound.split()[1]) == tolerance.hidden
        (values,) = (row for name, row in rows.items() if name.startswith("every value"))
        assert (values.measured == "identical") == (kind in ("F32", "BF16")), out
        assert values.measured == "identical" or 0.01 < float(values.measured.split()[1]) <= 1, out


def test_a_type_without_tolerances_is_skipped(run, small_model, tmp_path, monkeypatch):
    """MXFP4 stands for all such types."""
    config, tensors, reference = small_model
    copy = write_gguf(tmp_path / "copy.gguf", build(config, tensors), "MXFP4")
    monkeypatch.delitem(verify.TOLERANCES, "MXFP4")
    failed, out, rows = run(init_from=copy, against=reference)
    assert not failed and names(rows, "skipped") == ["tensor types", "values, hidden states, logits, NLL"], out
    assert "29 MXFP4" in rows["tensor types"].measured and "the rounding of MXFP4 is unknown" in out


EMBED, LAYER = "model.embed_tokens.weight", "model.layers.2"
Q, K = (f"{LAYER}.self_attn.{part}_proj.weight" for part in "qk")
GATE, UP, BIAS = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.self_attn.q_proj.bias"


def one_value(tensor, change):
    changed = tensor.float()
    changed[100, 200] += change
    return changed.to(tensor.dtype)


ONE = f"{Q}: 1 of 331,776 values"
FAULTS = {  # name: (tensors -> those that change, with None for one that is removed; text that the output must contain)
    "missing tensor": (lambda t: {UP: None}, f"missing: {UP}"),
    "extra bias": (lambda t: {BIAS: torch.zeros(576).bfloat16()}, f"not part of the model: {BIAS}"),
    "gate and up swapped": (lambda t: {GATE: t[UP], UP: t[GATE]}, f"{GATE}: "),
    "k transposed": (lambda t: {K: t[K].T}, f"{K} is [576, 192], not [192, 576]"),
    "one last bit": (lambda t: {Q: one_value(t[Q], t[Q][100, 200].item() * 2**-7)}, ONE),
    "not a number": (lambda t: {Q: one_value(t[Q], float("nan"))}, ONE),
    "llama.cpp's order": (lambda t: {Q: permute(t[Q], 9), K: permute(t[K], 3)}, f"{K}: "),
    "wrong dtype": (lambda t: {UP: t[UP].half()}, f"{UP} is F16"),
    "integers": (lambda t: {UP: t[UP].to(torch.int32)}, f"{UP} is torch.int32"),
    "untied head": (lambda t: {"lm_head.weight": one_value(t[EMBED], 0.5)}, "lm_head.weight differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_copy_with_one_fault_fails_and_is_named(run, small_model, tmp_path, fault):
    config, tensors, reference = small_model
    spoil, named = FAULTS[fault]
    tensors = {name: tensor for name, tensor in (tensors | spoil(tensors)).items() if tensor is not None}
    failed, out, rows = run(init_from=write_folder(tmp_path / "copy", config, tensors), against=reference)
    assert failed and named in out, out
    if fault in ("gate and up swapped", "llama.cpp's order", "not a number"):
        assert rows["hidden states, 4 layers (relative)"].measured == "first wrong at layer 2"


def test_a_copy_with_a_different_config(run, small_model, tmp_path):
    config, tensors, reference = small_model
    copy = write_folder(tmp_path / "theta", replace(config, rope_theta=10_000.0), tensors)
    failed, out, rows = run(init_from=copy, against=reference)
    assert failed and "rope_theta is 10000.0, not 100000.0" in out
    assert {"settings of the copy", "logits at all 64 positions"} <= set(names(rows, "✗"))
    shorter = {name: tensor for name, tensor in tensors.items() if "layers.3" not in name}
    copy = write_folder(tmp_path / "shorter", replace(config, num_hidden_layers=3), shorter)
    failed, out, rows = run(init_from=copy, against=reference)
    assert failed and "num_hidden_layers is 3, not 4" in out
    assert names(rows, "skipped") == ["hidden states, logits, NLL"]


def test_a_fault_in_a_gguf_or_a_checkpoint(run, small_model, tmp_path):
    config, tensors, reference = small_model
    changed = build(config, tensors | {UP: one_value(tensors[UP], 0.5)})
    flipped = build(config, {name: tensor.flip(0) if "mlp" in name else tensor for name, tensor in tensors.items()})
    bias = [("blk.2.attn_q.bias", torch.zeros(576))]
    save_checkpoint(tmp_path, build(config, tensors | {Q: one_value(tensors[Q].float(), 1e-6)}))
    for copy, named in (
        (write_gguf(tmp_path / "copy.gguf", changed, "Q4_1"), f"{UP}: "),
        (write_gguf(tmp_path / "flipped.gguf", flipped, "Q4_1"), "✗        argmax token"),
        (write_gguf(tmp_path / "bias.gguf", build(config, tensors), extra=bias), "not part of the model: blk.2"),
        (tmp_path / "ckpt.pt", ONE),
    ):
        failed, out, _ = run(init_from=copy, against=reference)
        assert failed and named in out, out


def test_the_full_model_with_one_value_changed(run, real_model, tmp_path):
    """Compare all 30 layers in bf16 with the wheel, 0.5 added to one of 134,515,008 values: only that is wrong."""
    tensors = {name: tensor.bfloat16() for name, tensor in real_model.state_dict().items()}
    name = "model.layers.17.self_attn.q_proj.weight"
    tensors[name][12, 34] += 0.5
    copy = write_folder(tmp_path / "copy", real_model.config, tensors)
    failed, out, rows = run(init_from=copy, against="base", tokens=32)
    assert failed and f"{name}: 1 of 331,776 values" in out
    assert names(rows, "✗") == ["every value, rounded to BF16"] and not names(rows, "skipped")


# ---- Checkpoints
@pytest.fixture
def trained(tmp_path):
    """Write a checkpoint after two updates, as train.py does. Return (path, contents)."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = tiny(vocab_size=512, max_position_embeddings=64, initializer_range=0.2, **heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    idx = torch.arange(64)[None]
    for _ in range(2):
        model(idx, idx.roll(-1)).backward()
        optimizer.step()
        scheduler.step()
    save_checkpoint(tmp_path, model)
    path = tmp_path / "ckpt.pt"
    contents = read_checkpoint(path, resume=False)
    contents |= dict(optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), iter_num=2)
    write_checkpoint(path, contents)
    return path, contents


def test_a_trained_checkpoint(run, trained):
    path, contents = trained
    failed, out, rows = run(init_from=path)
    assert not failed and len(names(rows, "skipped")) == 3, out
    assert rows["finite moments"].result == rows["logits at all 64 positions"].result == "✓"
    assert rows["iteration: ckpt.pt, schedule, optimizer"].measured == "2"
    best = {name: value for name, value in contents.items() if name not in ("optimizer", "scheduler")}
    for changed in (contents | dict(optimizer={"state": {}}, iter_num=0), best):  # before the first step; a best.pt
        write_checkpoint(path, changed)
        failed, out, rows = run(init_from=path)
        assert not failed and rows["finite moments, and one iteration"].result == "skipped"


def test_a_faulty_checkpoint(run, trained):
    path, contents = trained
    weights = contents["model"]
    up = "model.layers.1.mlp.up_proj.weight"
    moments = {i: dict(state) for i, state in contents["optimizer"]["state"].items()}
    moments[5]["exp_avg"] = moments[5]["exp_avg"] * float("inf")
    for changes, row, named in (
        (dict(optimizer={"state": moments}), "finite moments", "exp_avg of parameter 5"),
        (dict(model=weights | {up: weights[up].bfloat16()}), "tensor types", f"{up} is BF16"),
        (dict(iter_num=3), "iteration: ckpt.pt, schedule, optimizer", "2, 3"),
    ):
        write_checkpoint(path, contents | changes)
        failed, out, rows = run(init_from=path)
        assert failed and names(rows, "✗") == [row] and named in out, out


# ---- The command
def test_one_token_leaves_nothing_to_predict(capsys):
    with pytest.raises(SystemExit) as stop:
        verify.main(VerifyConfig(tokens=1))
    assert stop.value.code == 2 and "--tokens=1" in capsys.readouterr().err


def test_the_command_line(trained):
    path, contents = trained
    write_checkpoint(path, contents | dict(iter_num=7))
    command = [sys.executable, "verify.py", f"--init_from={path}"]
    done = subprocess.run(command, cwd=Path(verify.__file__).parent, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (1, "") and ", 1 ✗, 3 skipped" in done.stdout
