"""weights.py: config.json and safetensors as transformers writes them, and what bad files get."""

import ast
import hashlib
import json
import os
import pickle
import random
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from networks import llama, load, refusal, same_logits, save, write_dataset, write_gguf
from safetensors.torch import load_file, save_file
from spoil import SMALL_TOKENIZER, spoil
from transformers import LlamaConfig

import verify
from lib import tokenizer
from lib.checkpoint import write_checkpoint
from lib.dataset import open_data
from lib.official import SHA256, find_release
from lib.tokenizer import load_tokenizer
from lib.weights import (
    config_from_json,
    config_to_json,
    find_weights,
    load_network,
    read_config,
    read_settings,
    release_tensors,
)
from model import PRESETS, ModelConfig


def test_the_official_config():
    """Written out from what is known, proved by its pinned hash, read as the preset."""
    config = dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=0, hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664,
        intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192, model_type="llama",
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True, vocab_size=49152,
    )  # fmt: skip
    text = json.dumps(config, indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256["HuggingFaceTB/SmolLM2-135M"]["config.json"]
    assert config_from_json(json.loads(text)) == PRESETS["135M"]


@pytest.mark.parametrize("absent", [
    ["num_key_value_heads"], ["head_dim"], ["rope_parameters"], ["rms_norm_eps"], ["max_position_embeddings"],
    ["num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "max_position_embeddings"],
])  # fmt: skip
def test_absent_settings_are_what_transformers_takes(absent):
    config = llama().config.to_dict()
    for name in absent:
        del config[name]
    ours, theirs = read_settings(config), LlamaConfig(**config)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act"):
        assert ours[name] == getattr(theirs, name), name
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_json_is_read_as_it_was_written(preset):
    written = config_to_json(PRESETS[preset], mlp_bias=False)
    assert config_from_json(json.loads(json.dumps(written))) == PRESETS[preset]
    assert LlamaConfig(**written).head_dim == PRESETS[preset].head_dim


def test_folders_saved_by_transformers(tmp_path):
    for i, changes in enumerate([{}, {"num_key_value_heads": 4, "head_dim": 16}, {"rms_norm_eps": 1e-3}]):
        network = llama(seed=i, **changes)
        release = find_release(str(save(tmp_path / str(i), network)))
        assert "rope_parameters" in read_config(release.path)  # transformers 5
        assert (release.source, release.revision) == ("folder", "none")
        same_logits(release, network)


def test_full_attention_in_every_layer_is_ours_and_dropout_is_told(tmp_path):
    network = llama(layer_types=["full_attention"] * 2, attention_dropout=0.1)
    path = save(tmp_path, network)
    assert json.loads((path / "config.json").read_text())["layer_types"] == ["full_attention"] * 2
    source = find_weights(str(path))
    assert source.about.splitlines()[-1] == "note: config.json says attention_dropout = 0.1; train.py has no dropout"
    same_logits(find_release(str(path)), network)  # in evaluation, where transformers has none either
    edited(path, attention_dropout=0.0)
    assert "note:" not in find_weights(str(path)).about


def test_weights_keep_their_dtype_and_may_repeat_the_head(tmp_path):
    network = llama().bfloat16()
    release = find_release(str(save(tmp_path, network)))
    assert {tensor.dtype for tensor in release_tensors(release).values()} == {torch.bfloat16}
    tensors = release_tensors(release)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    model = load(tmp_path)
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, network.model.embed_tokens.weight.float())


# ---------------------------------------------------------------------------------------------
# Settings beside the weights


def test_settings_that_fit_any_tensors_may_change(tmp_path):
    source = find_weights(str(save(tmp_path)))
    network = load_network(source, replace(source.config, rope_theta=7.0, max_position_embeddings=9, rms_norm_eps=0.1))
    assert (network.config.rope_theta, len(network.cos)) == (7.0, 9)
    assert network.model.norm.eps == 0.1 and not torch.equal(network.cos, load_network(source).cos[:9])


@pytest.mark.parametrize("name, value", [
    ("hidden_size", 128), ("num_hidden_layers", 1), ("num_attention_heads", 8), ("num_key_value_heads", 4),
    ("head_dim", 16), ("intermediate_size", 97), ("vocab_size", 97),
])  # fmt: skip
def test_settings_of_another_shape_are_refused_by_name(name, value, tmp_path):
    source = find_weights(str(save(tmp_path)))
    message = refusal(load_network, source, replace(source.config, **{name: value}))
    assert f"{name} is set to {value}" in message and f"has {getattr(source.config, name)}" in message


# ---------------------------------------------------------------------------------------------
# What bad input gets


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def edited(folder, **changes):
    """config.json with other values; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def in_weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def nested(depth):
    return [nested(depth - 1)] if depth else []


def rope(**parameters):
    return {"rope_parameters": parameters}


LAYER = "model.layers.1.self_attn.q_proj.weight"
SPOILT = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
    "cut in its header": (cut("model.safetensors", 100), ["model.safetensors", "not a whole safetensors file"]),
    "cut in its tensors": (cut("model.safetensors", 90_000), ["model.safetensors", "not a whole safetensors file"]),
    "empty": (cut("model.safetensors", 0), ["model.safetensors", "not a whole safetensors file"]),
    "cut config": (cut("config.json", 100), ["config.json", "is not JSON"]),
    "binary config": (write("config.json", b"\xff\xfe\x00"), ["config.json", "is not JSON"]),
    "list for a config": (write("config.json", b"[1]"), ["config.json", "not an object"]),
    "attention bias": (lambda folder: edited(folder, attention_bias=True), ["attention_bias = True"]),
    "mlp bias": (lambda folder: edited(folder, mlp_bias=True), ["mlp_bias = True"]),
    "gelu": (lambda folder: edited(folder, hidden_act="gelu"), ["hidden_act = 'gelu'"]),
    "untied": (lambda folder: edited(folder, tie_word_embeddings=False), ["tie_word_embeddings = False"]),
    "other network": (lambda folder: edited(folder, model_type="qwen2"), ["model_type = 'qwen2'"]),
    "interleaved": (lambda folder: edited(folder, rope_interleaved=True), ["rope_interleaved = True"]),
    "scaled, transformers 4": (
        lambda folder: edited(folder, rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]
    ),
    "scaled, transformers 5": (
        lambda folder: edited(folder, **rope(rope_type="llama3", rope_theta=1e4, factor=8.0)), ["rope", "llama3"]
    ),
    "no hidden size": (lambda folder: edited(folder, hidden_size=None), ["config.json has no hidden_size"]),
    "heads that do not divide": (lambda folder: edited(folder, num_key_value_heads=3), ["num_key_value_heads (3)"]),
    "heads in words": (lambda folder: edited(folder, num_attention_heads="four"), ["config.json"]),
    "another width": (lambda folder: edited(folder, hidden_size=128), ["contradict its config", "size mismatch"]),
    "fewer layers": (lambda folder: edited(folder, num_hidden_layers=1), ["contradict its config", "layers.1"]),
    "a missing tensor": (in_weights(lambda tensors: tensors.pop(LAYER)), ["contradict its config", LAYER]),
    "a tensor too many": (
        in_weights(lambda tensors: tensors.update({LAYER.replace("weight", "bias"): torch.zeros(128)})),
        ["contradict its config", "q_proj.bias"],
    ),
    "a transposed tensor": (
        in_weights(lambda tensors: tensors.update({LAYER: tensors[LAYER].T.contiguous()})),
        ["contradict its config", LAYER],
    ),
    "a head of its own": (
        in_weights(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 64)})), ["lm_head.weight", "ties"]
    ),
    "weights of whole numbers": (
        in_weights(lambda tensors: tensors.update({LAYER: tensors[LAYER].to(torch.int8)})), [LAYER, "int8"]
    ),
    "a norm of NaN": (in_weights(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)), ["model.norm", "NaN"]),
    "one infinite weight": (in_weights(lambda tensors: tensors[LAYER][3, 5:6].fill_(torch.inf)), [LAYER, "infinity"]),
    "nested config": (write("config.json", b"[" * 100_000), ["config.json", "nested too deep"]),
    "nested value": (
        lambda folder: edited(folder, hidden_size=nested(500)), ["config.json", "hidden_size is [["]
    ),
    "scaling in words": (lambda folder: edited(folder, rope_scaling="linear"), ["rope_scaling is 'linear'"]),
    "scaling false": (lambda folder: edited(folder, rope_scaling=False), ["rope_scaling is False"]),
    "rope in a list": (lambda folder: edited(folder, rope_parameters=[1]), ["rope_parameters is [1]"]),
    "rope by layer": (lambda folder: edited(folder, **rope(full_attention={})), ["rope_parameters is {'full"]),
    "two thetas": (lambda folder: edited(folder, rope_theta=7.0), ["rope_theta is said to be 7.0 and 20000.0"]),
    "half rotated": (lambda folder: edited(folder, partial_rotary_factor=0.5), ["partial_rotary_factor = 0.5"]),
    "half rotated, transformers 5": (
        lambda folder: edited(folder, **rope(partial_rotary_factor=0.5)), ["partial_rotary_factor = 0.5"]
    ),
    "quantised": (lambda folder: edited(folder, quantization_config={"bits": 4}), ["quantization_config = {'bits'"]),
    "a window": (lambda folder: edited(folder, sliding_window=512), ["sliding_window = 512"]),
    "windows in some layers": (
        lambda folder: edited(folder, layer_types=["full_attention", "sliding_attention"]), ["layer_types = ['full_att"]
    ),
    "layers in words": (lambda folder: edited(folder, layer_types="full_attention"), ["layer_types = 'full_att"]),
    "tables of gigabytes": (
        lambda folder: edited(folder, max_position_embeddings=2**24), ["16777216", "from 1 to 1,048,576"]
    ),
    "capped logits": (lambda folder: edited(folder, final_logit_softcapping=30.0), ["final_logit_softcapping = 30.0"]),
    "two lines": (lambda folder: edited(folder, hidden_act="a\nb\u2028c"), ["hidden_act = 'a\\nb\\u2028c'"]),
    "a head alone": (
        in_weights(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})),
        ["embed_tokens"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_folder_gets_one_line(how, tmp_path):
    spoil, words = SPOILT[how]
    spoil(save(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = refusal(lambda: load(tmp_path))
    for word in words:
        assert word in message, (word, message)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


WHOLE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings"]  # fmt: skip
FLOATS = ["rope_theta", "rms_norm_eps", "initializer_range"]


@pytest.mark.parametrize("name", WHOLE + FLOATS)
@pytest.mark.parametrize(
    "value",
    ["64", "many", True, torch.nan, -torch.inf, 64.5, -1, 0, 1e9, 10**12, 10**400, [64]],
    ids=lambda v: repr(v)[:9],
)
def test_a_number_of_another_kind_is_refused_by_name(name, value):
    config = llama().config.to_dict() | {"rope_parameters": None, "rope_theta": 2e4, name: value}
    low, high = ModelConfig.LIMITS[name]
    if name in FLOATS and type(value) in (int, float) and low <= value <= high:
        return  # a float like any other
    message = refusal(config_from_json, config)
    assert name in message and repr(value)[:40] in message


@pytest.mark.parametrize("name", ["rms_norm_eps", "max_position_embeddings", "initializer_range", "vocab_size"])
def test_null_is_not_a_number(name):
    assert f"{name} is None" in refusal(config_from_json, llama().config.to_dict() | {name: None})


def test_a_pipe_or_a_folder_for_a_file_gets_one_line(tmp_path):
    for make in (os.mkfifo, os.mkdir):
        for name in ("config.json", "model.safetensors"):
            folder = save(tmp_path / make.__name__ / name)
            (folder / name).unlink()
            make(folder / name)
            assert f"{name} is not a file" in refusal(load, folder)


# ---------------------------------------------------------------------------------------------
# Whatever a file holds, it is read, or it is refused in one line


@pytest.mark.parametrize("kind", ["config.json", "model.safetensors", "index", "gguf", "tokenizer.json", "meta.json"])
def test_a_spoilt_file_is_read_or_refused(kind, tmp_path, monkeypatch):
    rng, network = random.Random(kind), llama()
    monkeypatch.setattr(tokenizer, "PARTS", tokenizer.deciding_parts(SMALL_TOKENIZER))
    if kind == "gguf":
        path = Path(write_gguf(tmp_path / "a.gguf", network))
    elif kind == "meta.json":
        write_dataset(tmp_path / "notes")
        path = tmp_path / "notes/meta.json"
    else:
        save(tmp_path, network, max_shard_size="60KB" if kind == "index" else "1GB")
        path = tmp_path / ("model.safetensors.index.json" if kind == "index" else kind)
    if kind == "tokenizer.json":
        path.write_text(json.dumps(SMALL_TOKENIZER))
    sound, outcomes = path.read_bytes(), Counter()
    for i in range(120):
        content = spoil(sound, rng)
        target = path.with_name(f"{i}.gguf") if kind == "gguf" else path  # the reader of a GGUF is kept by its name
        target.write_bytes(content)
        try:
            if kind == "tokenizer.json":
                load_tokenizer(str(tmp_path))
            elif kind == "meta.json":
                open_data("notes", 50, 8, tmp_path)
            else:
                load(target if kind == "gguf" else tmp_path)
            outcomes["read"] += 1
        except SystemExit as stop:
            message = str(stop.code)
            assert message.startswith("error: ") and len(message.splitlines()) == 1, (message, content)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(content[:2_000]) from error
    assert min(outcomes["refused"], outcomes["read"]) > 0, outcomes  # both happen, or the loop tests nothing


@pytest.mark.parametrize("name", ["model.safetensors", "weights.gguf", "config.json"])
def test_a_pickle_executes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    save(tmp_path / "folder")
    (tmp_path / "folder" / name).write_bytes(pickle.dumps(Bomb()))
    path = tmp_path / "folder" / name if name.endswith(".gguf") else tmp_path / "folder"
    refusal(lambda: load(path))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # it would have
    assert (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------
# The weights that people have


@pytest.fixture(scope="module")
def peer():
    """(a network of transformers, the folder in which it saved itself): do not change them."""
    with tempfile.TemporaryDirectory() as folder:
        network = llama(seed=4)
        yield network, save(Path(folder), network)


def other_file(folder, name, change=lambda tensors: tensors, keep=False, **how):
    """The network in a file of another name, format or layout, in place of model.safetensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    if not keep:
        (folder / "model.safetensors").unlink()
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name, **how)
    return folder / name


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def lightning(tensors):
    versions = {"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5.0"}
    return versions | {"state_dict": prefixed("model.")(with_head(tensors))}


def in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(shard.values()):
        torch.save({name: tensors[name] for name in tensors if shard[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    return folder


def renamed_gguf(folder, name):
    path = folder / name
    write_gguf(path, llama(seed=4))
    return path


def in_the_hubs_cache(folder):
    outer = folder / "models--org--name"
    (outer / "snapshots").mkdir(parents=True)
    snapshot = outer / "snapshots" / ("c0ffee" + 34 * "0")
    snapshot.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).rename(snapshot / file)
    return outer


READ = {  # how: (what is made of a folder that transformers wrote, returning what is named; words of the about line)
    "pytorch_model.bin": (
        lambda folder: other_file(folder, "pytorch_model.bin", with_head).parent,
        "pytorch_model.bin sha256",
    ),
    "before torch 1.6": (
        lambda folder: other_file(folder, "pytorch_model.bin", _use_new_zipfile_serialization=False).parent,
        "from folder",
    ),
    "shards of it": (in_shards, "pytorch_model-00002-of-00002.bin sha256"),
    "consolidated": (lambda folder: other_file(folder, "consolidated.safetensors").parent, "consolidated.safetensors"),
    "a .pth before 1.6": (
        lambda folder: other_file(folder, "any.pth", _use_new_zipfile_serialization=False),
        "from file",
    ),
    "a .bin, named": (lambda folder: other_file(folder, "any.bin"), "from file"),
    "a .pt beside a config": (lambda folder: other_file(folder, "any.pt"), "from file"),
    "a .safetensors, named": (lambda folder: folder / "model.safetensors", "from file"),
    "one of several": (
        lambda folder: [other_file(folder, "mine.safetensors", keep=True), save(folder, llama(seed=5))][0],
        "mine.safetensors sha256",
    ),
    "Lightning": (lambda folder: other_file(folder, "last.ckpt", lightning), "without their prefix model."),
    "GGUF in capitals": (lambda folder: renamed_gguf(folder, "A.GGUF"), "A.GGUF sha256"),
    "Ollama's": (lambda folder: renamed_gguf(folder, "sha256-" + 64 * "0"), "from file"),
    "the Hub's cache": (in_the_hubs_cache, "snapshots/c0ffee"),
    "compiled": (
        lambda folder: other_file(folder, "model.safetensors", prefixed("_orig_mod."), True).parent,
        "prefix _orig_mod.",
    ),
    "compiled, then parallel": (
        lambda folder: other_file(folder, "pytorch_model.bin", prefixed("module._orig_mod.")).parent,
        "prefix module._orig_mod.",
    ),
    "merged by peft": (
        lambda folder: other_file(folder, "model.safetensors", prefixed("base_model.model."), True).parent,
        "prefix base_model.model.",
    ),
}


@pytest.mark.parametrize("how", READ)
def test_it_is_read_whatever_its_form(how, peer, tmp_path):
    network, folder = peer
    shutil.copytree(folder, tmp_path / "copy")
    make, words = READ[how]
    source = find_weights(str(make(tmp_path / "copy")))
    assert words in source.about, source.about
    idx = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_network(source)(idx), network(idx).logits, atol=1e-4, rtol=0)
    assert "prefix" in words or "prefix" not in source.about


def test_a_named_file_has_the_tokenizer_of_its_folder(peer, tmp_path):
    shutil.copytree(peer[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "model.safetensors", tmp_path):
        assert tokenizer.tokenizer_json(**find_weights(str(path)).tokenizer)[0] == b"{}"
    source = find_weights(str(in_the_hubs_cache(tmp_path)))
    (tmp_path / "tokenizer.json").rename(source.path / "tokenizer.json")
    assert tokenizer.tokenizer_json(**source.tokenizer)[0] == b"{}"


CHECKPOINT = dict(model={}, optimizer={}, scheduler={}, iter_num=7, config={"dataset": "text"}, data={})


@pytest.mark.parametrize("name", ["ckpt.pt.bak", "best.ckpt", "weights"])
def test_a_renamed_checkpoint_is_known_by_its_content(name, peer, tmp_path):
    config = asdict(find_weights(str(peer[1])).config) | {"dataset": "text"}
    tensors = prefixed("_orig_mod.")(
        load_file(peer[1] / "model.safetensors")
    )  # saved by a fork that compiles the whole
    write_checkpoint(tmp_path / name, CHECKPOINT | {"model": tensors, "config": config})
    shutil.copy(peer[1] / "config.json", tmp_path)
    source = find_weights(str(tmp_path / name))
    assert "iteration 7, trained on text" in source.about and "prefix _orig_mod." in source.about
    same = load_network(source).state_dict()
    assert all(torch.equal(tensor, same[key]) for key, tensor in load(peer[1]).state_dict().items())


def adapter(folder, **changes):
    (folder / "model.safetensors").unlink()
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8} | changes
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def empty(folder, *names):
    """The folder with these files (or, ending in /, folders) alone."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"GGUF")
    return folder


def saved(value, name):
    def make(folder):
        (folder / "config.json").unlink()
        torch.save(value, folder / name)
        return folder / name

    return make


def instead(name, content, named=False):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name if named else folder

    return make


def two_revisions(folder):
    outer = in_the_hubs_cache(folder)
    (outer / "snapshots/a_newer").mkdir()
    (outer / "refs").mkdir()
    (outer / "refs/main").write_text("c0ffee" + 34 * "0")
    return outer


def one_more(name):
    return lambda folder: (
        other_file(folder, "model.safetensors", lambda tensors: tensors | {name: torch.zeros(1)}, True).parent
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:80521b40\nsize 269060552\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
NAMED = {  # how: (what is made of the folder, returning what is named; words of the one line. F is the folder)
    "LoRA": (
        adapter,
        ["F is a LoRA adapter of org/base", "pip install peft", "merge_and_unload()", "--init_from=F-merged"],
    ),
    "its file": (lambda folder: adapter(folder) / "adapter_model.safetensors", ["F is a LoRA adapter of org/base"]),
    "prompt tuning": (lambda folder: adapter(folder, peft_type="PROMPT_TUNING"), ["cannot be merged", "name org/base"]),
    "MLX's LoRA": (
        lambda folder: adapter(folder, peft_type=None, model="org/mlx", lora_parameters={}),
        ["mlx_lm.fuse --model org/mlx"],
    ),
    "not merged": (
        one_more("model.layers.0.self_attn.q_proj.lora_A.default.weight"),
        ["a LoRA adapter that is not merged"],
    ),
    "LFS pointer": (
        instead("model.safetensors", POINTER),
        ["model.safetensors is a Git LFS pointer", "git -C F lfs pull"],
    ),
    "LFS pointer, named": (instead("a.GGUF", POINTER, True), ["a.GGUF is a Git LFS pointer", "git -C F lfs pull"]),
    "LFS pointer, .pt": (instead("a.pt", POINTER, True), ["a.pt is not a whole checkpoint", "Git LFS pointer"]),
    "page": (instead("model.safetensors", PAGE), ["model.safetensors is a web page", "download it again"]),
    "page for a config": (instead("config.json", PAGE), ["config.json is a web page"]),
    "page for a GGUF": (instead("a.gguf", PAGE, True), ["a.gguf is a web page"]),
    "message": (instead("model.safetensors", b"Entry not found"), ['is only the text "Entry not found"']),
    "text": (instead("a.txt", b"Once upon a time", True), ["a.txt is not a release", "--init_from=F"]),
    "Trainer": (
        lambda folder: empty(folder, "checkpoint-500/", "checkpoint-1000/", "checkpoint-x/"),
        ["F is a Trainer's output folder", "--init_from=F/checkpoint-1000"],
    ),
    "a run": (lambda folder: empty(folder, "ckpt.pt"), ["F is the folder of a run", "--init_from=F/ckpt.pt"]),
    "a GGUF in it": (lambda folder: empty(folder, "a.GGUF"), ["--init_from=F/a.GGUF"]),
    "weights of another name": (
        lambda folder: other_file(folder, "mine.safetensors").parent,
        ["F holds no model.safetensors", "--init_from=F/mine.safetensors"],
    ),
    "weights alone": (
        lambda folder: [folder / "model.safetensors", (folder / "config.json").unlink()][0],
        ["model.safetensors holds weights alone: put the config.json"],
    ),
    "a shard": (
        lambda folder: other_file(folder, "model-00001-of-00002.safetensors"),
        ["one of several shards", "--init_from=F"],
    ),
    "shards without an index": (
        lambda folder: other_file(folder, "model-00001-of-00002.safetensors").parent,
        ["F holds no model.safetensors: put model.safetensors"],
    ),
    "two revisions": (two_revisions, ["holds 2 revisions", "--init_from=F/models--org--name/snapshots/c0ffee"]),
    "ONNX": (lambda folder: empty(folder, "model.onnx"), ["F holds weights for ONNX alone (model.onnx)"]),
    "ONNX, named": (lambda folder: instead("model.onnx", b"onnx", True)(folder), ["model.onnx is a file for ONNX"]),
    "nanoGPT": (
        saved({"model": {}, "iter_num": 3, "config": {}, "model_args": {}}, "ckpt.pt"),
        ["ckpt.pt is a checkpoint of nanoGPT's"],
    ),
    "Lightning": (
        saved({"pytorch-lightning_version": "2", "state_dict": {"a": torch.ones(1)}}, "a.ckpt"),
        ["put the config.json of that network"],
    ),
    "Lightning, with objects": (
        saved({"pytorch-lightning_version": "2", "hyper_parameters": Path("a")}, "a.ckpt"),
        ["PyTorch Lightning wrote it: it holds more"],
    ),
    "a state dict": (
        saved({"a": torch.ones(1)}, "a.pth"),
        ["a.pth lacks", "put the config.json of that network beside it"],
    ),
    "an optimizer": (saved({"state": {}, "param_groups": []}, "optimizer.pt"), ["it is not a checkpoint of train.py"]),
    "an optimizer for weights": (
        lambda folder: other_file(folder, "pytorch_model.bin", lambda tensors: {"state": tensors}).parent,
        ["holds more than the tensors"],
    ),
    "GPTQ": (
        lambda folder: edited(folder, quantization_config={"quant_method": "gptq"}) or folder,
        ["quantization_config = {'quant_method': 'gptq'}", "quantised by gptq: take the network as it was before"],
    ),
    "MLX": (
        lambda folder: edited(folder, quantization={"bits": 4}) or folder,
        ["quantization = {'bits': 4}", "by MLX"],
    ),
    "GPTQ, by its tensors": (one_more("model.layers.0.mlp.up_proj.qweight"), ["is quantised by GPTQ or AWQ"]),
    "Meta": (one_more("tok_embeddings.weight"), ["has Meta's names", "model.safetensors"]),
}


@pytest.mark.parametrize("how", NAMED)
def test_it_is_named_with_the_next_command(how, peer, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(peer[1], folder)
    make, words = NAMED[how]
    message = refusal(lambda: load(make(folder))).replace(str(folder), "F")
    for word in words:
        assert word in message, (word, message)


def test_the_command_that_merges_is_python(peer, tmp_path):
    """peft itself is no dependency of the tests: here only that a shell and Python read the line as it is meant."""
    folder = tmp_path / "it's mine"
    shutil.copytree(peer[1], folder)
    message = refusal(find_weights, str(adapter(folder)))
    command = shlex.split(message[message.index("python -c") : message.index(", then --init_from")])
    calls = [node for node in ast.walk(ast.parse(command[2])) if isinstance(node, ast.Call)]
    assert {call.func.attr: [arg.value for arg in call.args] for call in calls} == {
        "from_pretrained": [str(folder)], "merge_and_unload": [], "save_pretrained": [f"{folder}-merged"],
    }  # fmt: skip


def test_transformers_reads_what_it_can_and_our_tensors_where_it_cannot(peer, tmp_path):
    """verify.py's oracle must be the network that was asked for, in whatever form it is."""
    for how in ("pytorch_model.bin", "one of several", "compiled", "the Hub's cache"):
        shutil.copytree(peer[1], tmp_path / how)
        release = find_release(str(READ[how][0](tmp_path / how)))
        oracle = verify.transformers_network(release, release_tensors(release))
        same_logits(release, oracle)
        assert torch.equal(oracle.model.embed_tokens.weight, peer[0].model.embed_tokens.weight)
