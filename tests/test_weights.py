"""lib/weights.py: models saved by transformers and peft load in every format; bad files get a one-line error."""

import json
import os
import pickle
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from networks import assert_same_logits, llama, load, refusal, save, save_checkpoint, write_gguf
from safetensors.torch import load_file, save_file
from spoil import spoil
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.fsdp._common_utils import FSDP_PREFIX, clean_tensor_name
from transformers import AutoModelForCausalLM, LlamaConfig

from lib.tokenizer import tokenizer_json
from lib.weights import config_from_json, config_to_json, find_weights, load_model
from model import PRESETS

INDEX = "pytorch_model.bin.index.json"
ABSENT = ["num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "max_position_embeddings"]


@pytest.mark.parametrize("changes", [
    *({name: None} for name in ABSENT), dict.fromkeys(ABSENT), {"rope_parameters": None, "rope_theta": 7.0},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 9.0}},
    {"rms_norm_eps": 1e-3}, {"num_key_value_heads": 4, "head_dim": 16},
])  # fmt: skip
def test_a_config_is_read_as_transformers_reads_it(changes):
    config = {name: value for name, value in (llama().config.to_dict() | changes).items() if value is not None}
    ours, theirs = config_from_json(config), LlamaConfig(**config)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_json_is_read_as_it_was_written(preset):
    written = config_to_json(PRESETS[preset], mlp_bias=False)
    assert config_from_json(json.loads(json.dumps(written))) == PRESETS[preset]
    assert LlamaConfig(**written).head_dim == PRESETS[preset].head_dim


# ---- Folders saved by transformers, and other formats


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Return (transformers' model, the folder in which it was saved): do not change them."""
    network = llama(seed=4)
    return network, save(tmp_path_factory.mktemp("peer"), network)


@pytest.fixture
def folder(peer, tmp_path):
    """Return a copy of the folder, to change."""
    return Path(shutil.copytree(peer[1], tmp_path / "net"))


def test_weights_keep_their_dtype_and_may_repeat_the_head(tmp_path):
    network = llama().bfloat16()
    source = find_weights(str(save(tmp_path, network)))
    assert (source.source, source.revision, source.path) == ("folder", "none", tmp_path)
    assert {tensor.dtype for tensor in source.read().values()} == {torch.bfloat16}
    change(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path)
    model = load(tmp_path)
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, network.model.embed_tokens.weight.float())


def test_settings_that_fit_any_tensors_may_change_and_others_are_refused(peer):
    source = find_weights(str(peer[1]))
    network = load_model(source, replace(source.config, rope_theta=7.0, max_position_embeddings=9, rms_norm_eps=0.1))
    assert (network.config.rope_theta, len(network.cos), network.model.norm.eps) == (7.0, 9, 0.1)
    for name, value in dict(hidden_size=128, num_attention_heads=8, num_key_value_heads=4, vocab_size=97).items():
        message = refusal(load_model, source, replace(source.config, **{name: value}))
        assert f"{name} is set to {value}" in message and f"has {getattr(source.config, name)}" in message


def change(edit):
    """Return a function that changes the tensors in model.safetensors."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return apply


def move(name, prefix="", more=()):
    """Return a function that moves the tensors from model.safetensors to a file with that name and format."""

    def apply(folder):
        tensors = {prefix + key: tensor for key, tensor in load_file(folder / "model.safetensors").items()} | dict(more)
        (folder / "model.safetensors").unlink()
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, folder / name)
        return folder / name

    return apply


def write_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(shard.values()):
        torch.save({name: tensors[name] for name in tensors if shard[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    return folder


def add_wrappers(folder):
    """Add the prefixes of a compiled layer, FSDP and checkpointing, and RoPE's frequencies."""
    network = llama(seed=4)
    network.model.layers[1] = torch.compile(network.model.layers[1])
    tensors = network.state_dict()
    assert "model.layers.1._orig_mod.mlp.up_proj.weight" in tensors
    for name in list(tensors):
        wrapped = name.replace("self_attn.", f"self_attn.{FSDP_PREFIX}").replace("mlp.", f"mlp.{_CHECKPOINT_PREFIX}")
        assert clean_tensor_name(wrapped) == name
        tensors[FSDP_PREFIX + wrapped] = tensors.pop(name)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def gguf(name):
    return lambda folder: Path(write_gguf(folder / name, llama(seed=4)))


def put(place, *more):
    """Return a function that puts the model in a subfolder with that name, next to other folders."""

    def apply(folder):
        for name in (place, *more):
            (folder.parent / "outer" / name).mkdir(parents=True)
        shutil.copytree(folder, folder.parent / "outer" / place, dirs_exist_ok=True)
        return folder.parent / "outer"

    return apply


def checkpoint(name):
    def apply(folder):
        save_checkpoint(folder, load(folder), chat=True)
        return (folder / "ckpt.pt").rename(folder / name)

    return apply


def only(make):
    """Return a function that puts only the file made by `make` into a folder."""

    def apply(folder):
        file = make(folder)
        (folder.parent / "outer").mkdir()
        return file.rename(folder.parent / "outer" / file.name).parent

    return apply


FORMATS = {  # format: (a function that makes it from a folder and returns the path to pass, words in `about`)
    "pytorch_model.bin": (lambda f: move("pytorch_model.bin")(f).parent, "pytorch_model.bin: sha256"),
    "only a head": (change(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})), "from folder"),
    "wrapped": (add_wrappers, "pytorch_model.bin: sha256"),
    "shards": (write_shards, "pytorch_model-00002-of-00002.bin: sha256"),
    "a .bin, named": (move("any.bin", "module._orig_mod."), "from file"),
    "a .safetensors, named": (move("mine.safetensors"), "mine.safetensors: sha256"),
    "Ollama's": (gguf("sha256-" + 64 * "0"), "from file"),
    "a checkpoint": (checkpoint("best.ckpt"), "iteration 7, trained on text"),
    "a run": (only(checkpoint("ckpt.pt")), "outer/ckpt.pt, iteration 7, trained on text"),
    "a folder with a GGUF": (only(gguf("b.GGUF")), "outer/b.GGUF, from file"),
    "a Trainer's": (put("checkpoint-1000", "checkpoint-500", "checkpoint-x"), "= OUT/checkpoint-1000, from folder"),
    "the Hub's cache": (put("snapshots/c0ffee", "refs"), "= OUT/snapshots/c0ffee, from folder"),
}


@pytest.mark.parametrize("make, words", FORMATS.values(), ids=FORMATS)
def test_every_format_is_read(make, words, peer, folder):
    source = find_weights(str(make(folder)))
    assert words.replace("OUT", str(folder.parent / "outer")) in source.about, source.about
    assert_same_logits(source, peer[0])
    assert source.is_gguf == ("sha256-0" in source.about or "b.GGUF" in source.about)
    if source.source == "checkpoint":  # of a chat model
        assert source.special_ids["eos_token_id"] == 2 and source.chat_template and source.tokenizer == {}


def test_special_ids_template_and_tokenizer_come_from_the_folder(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    (folder / "tokenizer.json").write_text("{}")
    for path in (folder, folder / "model.safetensors"):
        source = find_weights(str(path))
        assert source.special_ids == {"eos_token_id": [5, 6]} and source.chat_template == "{{ x }}"
        assert tokenizer_json(**source.tokenizer) == (b"{}", str(folder / "tokenizer.json"))


def adapter(folder, to, **settings):
    """Let peft save an adapter of the model in `folder` to `to`. Return peft's model."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = dict(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, peft.LoraConfig(**config | settings))
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(to)
    return model


VALUES = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, {"target_modules": "all-linear"}, {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "down_proj": 7}},
    {"layers_to_transform": [1]},
])  # fmt: skip
def test_a_lora_adapter_is_merged_as_peft_merges_it(settings, peer, folder, tmp_path):
    theirs = adapter(folder, tmp_path / "lora", **settings).merge_and_unload().state_dict()
    for path in (tmp_path / "lora", tmp_path / "lora/adapter_model.safetensors"):
        source = find_weights(str(path))
        ours = load_model(source).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert not torch.equal(ours[VALUES], peer[0].state_dict()[VALUES])
    assert f"merged into\nweights:  {folder} = {folder}, from folder" in source.about
    assert source.path == tmp_path / "lora" and not source.is_gguf


def test_the_base_may_be_given_and_the_adapters_own_tokenizer_comes_first(peer, folder, tmp_path):
    adapter(folder, tmp_path / "lora")
    (tmp_path / "lora/chat_template.jinja").write_text("{{ y }}")
    (tmp_path / "lora/tokenizer.json").write_text("{}")
    folder.rename(tmp_path / "elsewhere")
    assert "no release and no path" in refusal(find_weights, str(tmp_path / "lora"))
    base = write_gguf(tmp_path / "base.gguf", peer[0])  # in any form
    source = find_weights(str(tmp_path / "lora"), base=base)
    assert source.tokenizer == {"path": tmp_path / "lora"} and source.chat_template == "{{ y }}"
    other = find_weights(str(tmp_path / "lora"), base=str(tmp_path / "elsewhere"))
    torch.testing.assert_close(load_model(source).state_dict(), load_model(other).state_dict())
    for name in (str(tmp_path / "elsewhere"), "resume"):
        with pytest.raises(SystemExit) as stop:
            find_weights(name, base=base)
        assert stop.value.code == 2


@pytest.mark.parametrize("changes, words", [
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"), ({"base_model_name_or_path": None}, "pass them with --base="),
    ({"base_model_name_or_path": "nobody/none", "revision": "v1"}, "nobody/none@v1 was not found"),
    ({"lora_alpha": None}, "adapter_model.safetensors cannot be used"),
    ({"use_dora": True}, "use_dora = True"), ({"bias": "all"}, "bias = 'all'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"), ({"a_new_setting": 3}, "a_new_setting = 3"),
])  # fmt: skip
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(changes, words, folder, tmp_path):
    adapter(folder, lora := tmp_path / "lora")
    edit("adapter_config.json", **changes)(lora)
    assert words in refusal(load, lora)


def test_an_adapter_needs_its_own_base_and_its_own_folder(folder, tmp_path):
    adapter(folder, lora := tmp_path / "lora")
    other = save(tmp_path / "other", llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=1))
    message = refusal(lambda: load_model(find_weights(str(lora), base=str(other))))
    assert "does not have the model's shapes" in message
    adapter(folder, tmp_path / "embedding", target_modules=["embed_tokens"])
    assert "embed_tokens" in refusal(load, tmp_path / "embedding")
    shutil.copytree(folder, lora, dirs_exist_ok=True)
    assert "holds both an adapter and a full model: choose one" in refusal(load, lora)
    for name in ("config.json", "adapter_model.safetensors"):
        (lora / name).unlink()
    assert "adapter_model.safetensors cannot be used" in refusal(load, lora)


# ---- Bad files


def edit(name="config.json", **changes):
    """Return a function that changes values in a JSON file; None removes a key."""

    def apply(folder):
        config = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return apply


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content) and folder / name


LAYER = "model.layers.1.self_attn.q_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:80521b40\nsize 269060552\n"
DAMAGE = {  # damage: (a function that damages the folder and may return a path to pass instead, words in the error)
    "no config": (lambda f: (f / "config.json").unlink(), "holds no weights"),
    "cut in its tensors": (lambda f: os.truncate(f / "model.safetensors", 90_000), "model.safetensors cannot be used"),
    "a GGUF cut in its header": (lambda f: [p := gguf("a.gguf")(f), os.truncate(p, 400)][0], "a.gguf cannot be used"),
    "a GGUF cut in its tensors": (lambda f: [p := gguf("a")(f), os.truncate(p, 90_000)][0], "a cannot be used"),
    "deep config": (lambda f: write("config.json", b"[" * 100_000)(f).parent, "config.json"),
    "mlp bias": (edit(mlp_bias=True), "mlp_bias = True"),
    "gelu": (edit(hidden_act="gelu\nb"), "hidden_act = 'gelu\\nb'"),
    "untied": (edit(tie_word_embeddings=False), "tie_word_embeddings = False"),
    "a different model": (edit(model_type="qwen2"), "model_type = 'qwen2'"),
    "scaled, transformers 5": (edit(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "'llama3'"),
    "scaling in words": (edit(rope_scaling="linear"), "config.json cannot be used"),
    "no hidden size": (edit(hidden_size=None), "config.json cannot be used (it has no hidden_size)"),
    "tables of gigabytes": (edit(max_position_embeddings=2**24), "max_position_embeddings is 16777216"),
    "GPTQ": (edit(quantization_config={"quant_method": "gptq"}), "before quantization, or a GGUF of it"),
    "a missing tensor": (change(lambda t: t.pop(LAYER)), f"{LAYER} is absent, not (128, 64)"),
    "an untied head": (change(lambda t: t.update({"lm_head.weight": torch.zeros(96, 64)})), "separate lm_head"),
    "whole numbers": (change(lambda t: t.update({LAYER: t[LAYER].to(torch.int8)})), f"{LAYER} holds NaN"),
    "one infinite weight": (change(lambda t: t[LAYER][3, 5:6].fill_(torch.inf)), f"{LAYER} holds NaN"),
    "LFS pointer": (lambda f: write("model.safetensors", POINTER)(f).parent, "Git LFS pointer, not the file"),
    "text": (write("a.txt", b"Once upon a time"), "a.txt cannot be used"),
    "no config.json": (lambda f: Path(shutil.move(f / "model.safetensors", f.parent)), "config.json next to them"),
    "a shard is missing": (lambda f: [write_shards(f), next(f.glob("*1-of-*.bin")).unlink()][0], "cannot be used (No"),
    "an index to other folders": (lambda f: edit(INDEX, weight_map={"a": "../x"})(write_shards(f)), "not next to it"),
    "two snapshots": (put("snapshots/a", "snapshots/b"), "holds 2 models: choose one"),
    "an optimizer state": (lambda f: move("pytorch_model.bin", more={"state": {}})(f).parent, "holds more than the"),
}  # fmt: skip


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damage_gets_one_line(damage, words, folder):
    result = damage(folder)
    message = refusal(lambda: load(result if isinstance(result, Path) else folder))
    assert words in message, message


@pytest.mark.parametrize("kind", ["config.json", "model.safetensors", "a.gguf"])
def test_a_file_damaged_at_random_is_read_or_refused(kind, folder):
    rng, outcomes = random.Random(kind), Counter()
    gguf("a.gguf")(folder)
    sound = (folder / kind).read_bytes()
    for i in range(60):
        target = folder / (f"{i}.gguf" if kind == "a.gguf" else kind)  # open_gguf caches by name
        target.write_bytes(spoil(sound, rng))
        try:
            load(target if kind == "a.gguf" else folder)
            outcomes["read"] += 1
        except SystemExit as stop:
            assert stop.code.startswith("error: ") and len(stop.code.splitlines()) == 1, stop.code
            outcomes["refused"] += 1
    assert outcomes["refused"] and (outcomes["read"] or kind == "a.gguf"), outcomes  # otherwise the loop tests nothing


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def test_a_pickle_executes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save({"a": Bomb()}, folder / "weights.pt")
    assert "could run code" in refusal(load, folder / "weights.pt")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refusal(load, folder)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # it would have
    assert (tmp_path / "exploded").exists()
