"""weights.py: networks as transformers and peft save them, whatever their form, and what bad files get."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import peft
import pytest
import torch
from networks import llama, load, refusal, same_logits, save, write_gguf
from safetensors.torch import load_file, save_file
from spoil import spoil
from transformers import AutoModelForCausalLM, LlamaConfig

from lib.checkpoint import write_checkpoint
from lib.official import SHA256
from lib.tokenizer import tokenizer_json
from lib.weights import config_from_json, config_to_json, find_weights, load_network
from model import PRESETS

# ---------------------------------------------------------------------------------------------
# config.json


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


ALL = ["num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "max_position_embeddings"]


@pytest.mark.parametrize("absent", [*([name] for name in ALL), ALL])
def test_absent_settings_are_what_transformers_takes(absent):
    config = {name: value for name, value in llama().config.to_dict().items() if name not in absent}
    ours, theirs = config_from_json(config), LlamaConfig(**config)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("rope", [
    {"rope_theta": 7.0}, {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": 7.0, "rope_scaling": None},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 9.0}},
])  # fmt: skip
def test_theta_is_the_one_that_transformers_takes(rope):
    config = llama().config.to_dict() | {"rope_parameters": None} | rope
    assert config_from_json(config).rope_theta == LlamaConfig(**config).rope_parameters["rope_theta"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_json_is_read_as_it_was_written(preset):
    written = config_to_json(PRESETS[preset], mlp_bias=False)
    assert config_from_json(json.loads(json.dumps(written))) == PRESETS[preset]
    assert LlamaConfig(**written).head_dim == PRESETS[preset].head_dim


# ---------------------------------------------------------------------------------------------
# What transformers saves, and what becomes of it


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(a network of transformers, the folder in which it saved itself): do not change them."""
    network = llama(seed=4)
    return network, save(tmp_path_factory.mktemp("peer"), network)


@pytest.fixture
def folder(peer, tmp_path):
    """A copy of the folder, to change."""
    return Path(shutil.copytree(peer[1], tmp_path / "net"))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "head_dim": 16}, {"rms_norm_eps": 1e-3}])
def test_folders_saved_by_transformers(changes, tmp_path):
    network = llama(seed=1, **changes)
    source = find_weights(str(save(tmp_path, network)))
    assert (source.source, source.revision, source.path) == ("folder", "none", tmp_path)
    same_logits(source, network)


def test_weights_keep_their_dtype_and_may_repeat_the_head(tmp_path):
    network = llama().bfloat16()
    source = find_weights(str(save(tmp_path, network)))
    tensors = source.read()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    change(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path)
    model = load(tmp_path)
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, network.model.embed_tokens.weight.float())


def test_settings_that_fit_any_tensors_may_change_and_others_are_refused(peer):
    source = find_weights(str(peer[1]))
    network = load_network(source, replace(source.config, rope_theta=7.0, max_position_embeddings=9, rms_norm_eps=0.1))
    assert (network.config.rope_theta, len(network.cos), network.model.norm.eps) == (7.0, 9, 0.1)
    for name, value in dict(hidden_size=128, num_attention_heads=8, num_key_value_heads=4, vocab_size=97).items():
        message = refusal(load_network, source, replace(source.config, **{name: value}))
        assert f"{name} is set to {value}" in message and f"has {getattr(source.config, name)}" in message


def change(edit):
    """A change of the tensors in model.safetensors."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return apply


def moved(name, prefix="", more=(), keep=False):
    """The tensors in a file of another name or format, in place of model.safetensors."""

    def apply(folder):
        tensors = {prefix + key: tensor for key, tensor in load_file(folder / "model.safetensors").items()} | dict(more)
        if not keep:
            (folder / "model.safetensors").unlink()
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, folder / name)
        return folder / name

    return apply


def in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(shard.values()):
        torch.save({name: tensors[name] for name in tensors if shard[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    return folder


def gguf(name):
    return lambda folder: Path(write_gguf(folder / name, llama(seed=4)))


def put(place, *more):
    """The network in a folder of that name inside its folder, beside other folders."""

    def apply(folder):
        (folder.parent / "outer" / place).mkdir(parents=True)
        for name in more:
            (folder.parent / "outer" / name).mkdir()
        shutil.copytree(folder, folder.parent / "outer" / place, dirs_exist_ok=True)
        return folder.parent / "outer"

    return apply


def checkpoint(name):
    def apply(folder):
        config = asdict(find_weights(str(folder)).config) | {"dataset": "text"}
        tensors = {f"_orig_mod.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
        state = dict(model=tensors, iter_num=7, config=config, data={}, best_val_loss=9.0, chat=True, machine={})
        write_checkpoint(folder / name, state)
        return folder / name

    return apply


def alone(make):
    """The file that `make` makes, in a folder that has nothing else."""
    return lambda folder: (
        [shutil.move(file := make(folder), put("empty")(folder)), file.unlink(missing_ok=True)]
        and (folder.parent / "outer")
    )


READ = {  # form: (what makes it of a folder, returning what is named; words of `about`)
    "pytorch_model.bin": (lambda f: moved("pytorch_model.bin")(f).parent, "pytorch_model.bin sha256"),
    "shards of it": (in_shards, "pytorch_model-00002-of-00002.bin sha256"),
    "a .bin, named": (moved("any.bin"), "from file"),
    "a .pt beside a config": (moved("any.pt", "module."), "from file"),
    "a .safetensors, named": (lambda f: f / "model.safetensors", "from file"),
    "one of two": (lambda f: [moved("mine.safetensors", keep=True)(f), save(f, llama(seed=5))][0], "mine.safetensors"),
    "GGUF in capitals": (gguf("A.GGUF"), "A.GGUF sha256"),
    "Ollama's": (gguf("sha256-" + 64 * "0"), "from file"),
    "compiled": (lambda f: moved("model.safetensors", "_orig_mod.", keep=True)(f).parent, "from folder"),
    "compiled, parallel": (lambda f: moved("pytorch_model.bin", "module._orig_mod.")(f).parent, "from folder"),
    "a checkpoint": (checkpoint("best.ckpt"), "iteration 7, trained on text"),
    "a run": (alone(checkpoint("ckpt.pt")), "outer/ckpt.pt, iteration 7, trained on text"),
    "a GGUF alone": (alone(gguf("b.gguf")), "outer/b.gguf, from file"),
    "a Trainer's": (put("checkpoint-1000", "checkpoint-500", "checkpoint-x"), "= OUT/checkpoint-1000, from folder"),
    "the Hub's cache": (put("snapshots/c0ffee", "refs"), "= OUT/snapshots/c0ffee, from folder"),
}


@pytest.mark.parametrize("form", READ)
def test_it_is_read_whatever_its_form(form, peer, folder):
    make, words = READ[form]
    source = find_weights(str(make(folder)))
    assert words.replace("OUT", str(folder.parent / "outer")) in source.about, source.about
    same_logits(source, peer[0])
    assert source.is_gguf == ("gguf" in words.lower() or form == "Ollama's")


def test_a_checkpoint_tells_whether_it_was_taught_conversations(folder):
    source = find_weights(str(checkpoint("a.pt")(folder)))
    assert source.source == "checkpoint" and source.special_ids["eos_token_id"] == 2 and source.chat_template
    assert source.tokenizer == {}


def test_special_ids_template_and_tokenizer_come_from_the_folder(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    (folder / "tokenizer.json").write_text("{}")
    for path in (folder, folder / "model.safetensors"):
        source = find_weights(str(path))
        assert source.special_ids == {"eos_token_id": [5, 6]} and source.chat_template == "{{ x }}"
        assert tokenizer_json(**source.tokenizer) == (b"{}", str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------
# LoRA adapters


def adapter(folder, to, **settings):
    """An adapter of the network in `folder`, as peft saves it to `to`; returns peft's model."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = dict(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, peft.LoraConfig(**config | settings))
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
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
        ours = load_network(source).state_dict()
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
    torch.testing.assert_close(load_network(source).state_dict(), load_network(other).state_dict())
    for name in (str(tmp_path / "elsewhere"), "resume"):
        with pytest.raises(SystemExit) as stop:
            find_weights(name, base=base)
        assert stop.value.code == 2


@pytest.mark.parametrize("settings, words", [
    ({"use_dora": True}, "use_dora = True"), ({"lora_bias": True}, "lora_bias = True"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save = ['embed_tokens']"), ({"bias": "all"}, "bias = 'all'"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ({"target_modules": ["lm_head"]}, "lm_head"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices = {'embed_tokens': [3]}"),
    ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters = "),
])  # fmt: skip
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(settings, words, folder, tmp_path):
    adapter(folder, tmp_path / "lora", **settings)
    assert words in refusal(load, tmp_path / "lora")


@pytest.mark.parametrize("changes, words", [
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"), ({"base_model_name_or_path": None}, "give them with --base="),
    ({"base_model_name_or_path": "nobody/none", "revision": "v1"}, "nobody/none@v1 was not found"),
    ({"lora_alpha": None}, "adapter_model.safetensors cannot be used"),
])  # fmt: skip
def test_a_damaged_adapter_gets_one_line(changes, words, folder, tmp_path):
    adapter(folder, lora := tmp_path / "lora")
    edited(lora, "adapter_config.json", **changes)
    assert words in refusal(load, lora)


def test_an_adapter_needs_its_own_base_and_a_folder_of_its_own(folder, tmp_path):
    adapter(folder, lora := tmp_path / "lora")
    other = save(tmp_path / "other", llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=1))
    message = refusal(lambda: load_network(find_weights(str(lora), base=str(other))))
    assert "has other shapes than the network" in message
    shutil.copytree(folder, lora, dirs_exist_ok=True)
    assert "holds an adapter and a whole network: name one" in refusal(load, lora)
    for name in ("config.json", "adapter_model.safetensors"):
        (lora / name).unlink()
    assert "adapter_model.safetensors cannot be used" in refusal(load, lora)


# ---------------------------------------------------------------------------------------------
# What bad files get


def edited(folder, name="config.json", **changes):
    """A JSON file with other values; None takes a key out."""
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit(**changes):
    return lambda folder: edited(folder, **changes)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content) and folder / name


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n]) and None


def index(weight_map):
    return lambda folder: edited(in_shards(folder), "pytorch_model.bin.index.json", weight_map=weight_map)


LAYER = "model.layers.1.self_attn.q_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:80521b40\nsize 269060552\n"
SPOILT = {  # how: (what spoils the folder, words of the one line). It may return what is named in the folder's place
    "no config": (lambda f: (f / "config.json").unlink(), "holds no weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "cut in its header": (cut("model.safetensors", 100), "model.safetensors cannot be used"),
    "cut in its tensors": (cut("model.safetensors", 90_000), "model.safetensors cannot be used"),
    "cut config": (cut("config.json", 100), "config.json"),
    "list for a config": (write("config.json", b"[1]"), "config.json"),
    "deep config": (lambda f: write("config.json", b"[" * 100_000)(f).parent, "config.json"),
    "attention bias": (edit(attention_bias=True), "attention_bias = True"),
    "mlp bias": (edit(mlp_bias=True), "mlp_bias = True"),
    "gelu": (edit(hidden_act="gelu\nb"), "hidden_act = 'gelu\\nb'"),
    "untied": (edit(tie_word_embeddings=False), "tie_word_embeddings = False"),
    "other network": (edit(model_type="qwen2"), "model_type = 'qwen2'"),
    "interleaved": (edit(rope_interleaved=True), "rope_interleaved = True"),
    "scaled, transformers 4": (edit(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling = {'factor': 2.0"),
    "scaled, transformers 5": (edit(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "'llama3'"),
    "scaling in words": (edit(rope_scaling="linear"), "config.json cannot be used"),
    "no hidden size": (edit(hidden_size=None), "config.json cannot be used (it has no hidden_size)"),
    "heads that do not divide": (edit(num_key_value_heads=3), "num_key_value_heads (3)"),
    "heads in words": (edit(num_attention_heads="four"), "num_attention_heads is 'four'"),
    "a list for a number": (edit(vocab_size=[96]), "vocab_size"),
    "tables of gigabytes": (edit(max_position_embeddings=2**24), "max_position_embeddings is 16777216"),
    "GPTQ": (edit(quantization_config={"quant_method": "gptq"}), "take it as it was before, or a GGUF of it"),
    "another width": (edit(hidden_size=128), "contradict its config"),
    "fewer layers": (edit(num_hidden_layers=1), "contradict its config"),
    "a missing tensor": (change(lambda t: t.pop(LAYER)), f"{LAYER} is absent, not (128, 64)"),
    "a bias": (change(lambda t: t.update({LAYER[:-6] + "bias": torch.zeros(128)})), "q_proj.bias"),
    "a transposed tensor": (change(lambda t: t.update({LAYER: t[LAYER].T.contiguous()})), LAYER),
    "a head of its own": (change(lambda t: t.update({"lm_head.weight": torch.zeros(96, 64)})), "lm_head.weight of"),
    "a head alone": (
        change(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})), "lm_head.weight of its own"
    ),
    "whole numbers": (change(lambda t: t.update({LAYER: t[LAYER].to(torch.int8)})), f"{LAYER} (torch.int8) holds"),
    "a norm of NaN": (change(lambda t: t["model.norm.weight"].fill_(torch.nan)), "holds NaN, infinity"),
    "one infinite weight": (change(lambda t: t[LAYER][3, 5:6].fill_(torch.inf)), f"{LAYER} (torch.float32) holds"),
    "LFS pointer": (lambda f: write("model.safetensors", POINTER)(f).parent, "Git LFS pointer, not the file"),
    "LFS pointer, GGUF": (write("a.gguf", POINTER), "lfs pull"),
    "text": (write("a.txt", b"Once upon a time"), "a.txt cannot be used"),
    "weights alone": (
        lambda f: [f / "model.safetensors", (f / "config.json").unlink()][0], "need a config.json beside them"
    ),
    "a shard is missing": (lambda f: [in_shards(f), next(f.glob("*1-of-*.bin")).unlink()][0], "cannot be used (No"),
    "an index that leads elsewhere": (index({"a": "../x.bin"}), "not beside it"),
    "an index of numbers": (index({"a": 3}), "index.json cannot be used"),
    "an index without a map": (index(None), "it has no weight_map"),
    "two snapshots": (put("snapshots/a", "snapshots/b"), "holds 2 networks: name one"),
    "an optimizer": (lambda f: moved("model.bin", more={"state": 3})(f), "model.bin"),
    "an optimizer for weights": (
        lambda f: moved("pytorch_model.bin", more={"state": {}})(f).parent, "it holds more than the tensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_network_gets_one_line(how, folder):
    spoil_it, words = SPOILT[how]
    result = spoil_it(folder)
    message = refusal(lambda: load(result if isinstance(result, Path) else folder))
    assert words in message, message


@pytest.mark.parametrize("kind", ["config.json", "model.safetensors", "index", "gguf"])
def test_a_file_spoilt_at_random_is_read_or_refused(kind, folder):
    rng = random.Random(kind)
    path = folder / ("pytorch_model.bin.index.json" if kind == "index" else kind)
    if kind == "index":
        in_shards(folder)
    sound, outcomes = (gguf("a.gguf")(folder) if kind == "gguf" else path).read_bytes(), Counter()
    for i in range(60):
        target = path.with_name(f"{i}.gguf") if kind == "gguf" else path  # the reader of a GGUF is kept by its name
        target.write_bytes(spoil(sound, rng))
        try:
            load(target if kind == "gguf" else folder)
            outcomes["read"] += 1
        except SystemExit as stop:
            assert stop.code.startswith("error: ") and len(stop.code.splitlines()) == 1, stop.code
            outcomes["refused"] += 1
    assert outcomes["refused"] and (outcomes["read"] or kind == "gguf"), outcomes  # else the loop tests nothing


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
