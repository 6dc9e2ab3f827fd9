"""
Weights from anywhere: a name or a path goes in, the network with those weights comes out.

    source = find_weights("resume", out_dir="out")     # out/ckpt.pt; or "base", a folder, a GGUF, a checkpoint, ...
    print(source.about)                                # what was found, with its hashes
    network = load_network(source)                     # model.SmolLM2, on the CPU, in fp32

Also config.json, in both directions: `config_from_json` reads one, `config_to_json` writes one.
"""

import functools
import math
import reprlib
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from lib.chat import TEMPLATE
from lib.checkpoint import check_crc, load_saved, read_checkpoint, state_dict_in
from lib.errors import first_line
from lib.files import read_json
from lib.formats import is_gguf, is_torch
from model import ModelConfig, SmolLM2, rope_tables

NAMES = {field.name for field in fields(ModelConfig)}
PLAIN = dict(bos_token_id=0, eos_token_id=0), ""  # special_ids and chat_template of the base releases
CHAT = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2), TEMPLATE  # and of the Instruct releases


@dataclass(frozen=True)
class Source:
    """Weights that were found but not yet read."""

    path: Path  # of the checkpoint, the folder or the file
    about: str  # what was found, in lines to print
    config: ModelConfig
    read: Callable  # () -> {name: tensor}
    tokenizer: dict  # the arguments of load_tokenizer
    special_ids: dict  # bos_token_id and eos_token_id (a list, if several end a text), perhaps pad_token_id
    chat_template: str  # in Jinja; empty if these weights were taught no conversation


def find_weights(init_from, out_dir="out"):
    """
    The Source that `init_from` names: "resume" is out_dir/ckpt.pt; what torch.save wrote, whatever its name, is a
    checkpoint; anything else is a release, as lib/official.py finds it. If there is none, the program ends with one
    line.
    """
    path = Path(out_dir) / "ckpt.pt" if init_from == "resume" else Path(init_from)
    if init_from == "resume" or is_checkpoint(path):
        checkpoint = read_checkpoint(path, mmap=True, resume=False)
        dataset = checkpoint["config"].get("dataset", "unknown text")
        about = f"checkpoint: {path}, iteration {checkpoint['iter_num']:,}, trained on {dataset}"
        about += about_prefix(checkpoint["model"], path)
        config = checkpoint_config(path, checkpoint)

        def read():
            check_crc(path)
            return without_prefix(checkpoint["model"])

        tokenizer = dict(checkpoint["tokenizer"])
        chat = tokenizer.pop("chat", False)  # trained on conversations, or from weights that were
        return Source(path, about, config, read, tokenizer, *(CHAT if chat else PLAIN))
    from lib.official import describe, find_release  # the Hub's client, imported only when needed

    release = find_release(init_from)
    about = describe(release) + ("" if is_gguf(release.path) else about_prefix(stored_tensors(release), release.path))
    if dropout := read_config(release.path).get("attention_dropout"):  # it changes training alone, so it is no refusal
        about += f"\nnote: config.json says attention_dropout = {reprlib.repr(dropout)}; train.py has no dropout"
    return replace(release_source(release), about=about)


def load_network(source, config=None):
    """
    SmolLM2 on the CPU in fp32 with the source's weights. config: settings to build it with in place of the source's
    own, of the same shapes. Ends the program with one line if weights and config do not fit.
    """
    if config is not None:
        check_shapes(config, source.config, source.path)
    tensors = without_head(source.read(), source.path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            sys.exit(
                f"error: {source.path}: {name} holds {tensor.dtype}, not floating-point numbers: take another copy"
            )
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            sys.exit(f"error: {source.path}: {name} holds NaN or infinity: take another copy")
    try:
        return build(config or source.config, tensors)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        wrong = textwrap.shorten(str(error).splitlines()[1], 240, placeholder=" ...")  # the first of possibly many
        sys.exit(f"error: the weights in {source.path} contradict its config: {wrong}")


def check_shapes(config, saved, path):
    """End the program with one line if `config` asks for another network than the one that was saved in `path`."""
    free = ("max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range")  # fit any tensors
    for name in sorted(NAMES.difference(free)):
        asked, there = getattr(config, name), getattr(saved, name)
        if asked != there:
            sys.exit(f"error: {name} is set to {asked}, but the network in {path} has {there}: leave that setting out")


def build(config, tensors):
    """SmolLM2 that shares these tensors (where they are fp32). It spends no time on random weights first."""
    with torch.device("meta"):  # shapes without memory
        network = SmolLM2(config)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    network.cos, network.sin = rope_tables(config, config.max_position_embeddings)
    return network


def expected_shapes(config):
    """{name: shape} of every tensor that model.py has under this config."""
    with torch.device("meta"):  # shapes without memory
        return {name: tuple(tensor.shape) for name, tensor in SmolLM2(config).state_dict().items()}


# ---------------------------------------------------------------------------------------------
# Checkpoints


def is_checkpoint(path):
    """Whether a file is for read_checkpoint: what torch.save wrote, but for a state dict beside its config.json."""
    if not is_torch(path):
        return path.suffix == ".pt"
    if not (path.parent / "config.json").exists():
        return True
    return state_dict_in(load_saved(path, True, "checkpoint", "take another copy")) is None


def checkpoint_config(path, checkpoint):
    """The ModelConfig in a checkpoint; ends the program with one line if its settings describe no network."""
    try:
        return ModelConfig(**{name: value for name, value in checkpoint["config"].items() if name in NAMES})
    except (TypeError, ValueError, AttributeError) as error:
        sys.exit(f"error: {path} describes no network ({type(error).__name__}: {error}): take an earlier checkpoint")


# ---------------------------------------------------------------------------------------------
# Releases


def release_source(release):
    """The Source of a Release."""
    read = functools.partial(release_tensors, release)
    tokenizer = {"official": release.asked}
    return Source(release.path, release.title, release_config(release), read, tokenizer, *release_specials(release))


def release_specials(release):
    """(special_ids, chat_template) of a Release, as its own files say."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    if is_gguf(release.path):
        from lib.gguf import header_value

        found = {name: header_value(release.path, f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        template = header_value(release.path, "tokenizer.chat_template") or ""
    else:
        from lib.official import RELEASES, beside

        if (release.title, release.revision) in RELEASES.values():
            return CHAT if release.title.endswith("-Instruct") else PLAIN
        files = [beside(release, name) for name in ("generation_config.json", "tokenizer_config.json")]
        generation, tokenizer = (read_json(file, "copy the release there again") if file else {} for file in files)
        settings = read_config(release.path)
        found = {name: settings.get(name) if generation.get(name) is None else generation[name] for name in names}
        template = tokenizer.get("chat_template", "")
        if not template and (file := beside(release, "chat_template.jinja")):
            template = file.read_text(encoding="utf-8", errors="replace")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        sys.exit(f"error: the chat_template of {release.path} is {reprlib.repr(template)}: it must be one Jinja text")
    found = {name: i for name, i in found.items() if i is not None}
    ids, _ = CHAT if template else PLAIN
    return found if "eos_token_id" in found else ids | found, template


def release_config(release):
    """The ModelConfig of a Release."""
    file = release.path if is_gguf(release.path) else release.path / "config.json"
    return config_from_json(read_config(release.path), file)


def read_config(path):
    """config.json of a folder as a dict; for a GGUF file, its header under the same names."""
    if is_gguf(path):
        from lib.gguf import read_gguf_config

        return read_gguf_config(path)
    return read_json(path / "config.json", "copy the release there again")


def release_tensors(release):
    """{name: tensor} under the release's names, in the file's dtype (fp32 from a GGUF)."""
    if is_gguf(release.path):
        from lib.gguf import read_gguf_tensors

        return read_gguf_tensors(release.path)
    return without_prefix(stored_tensors(release))


def stored_tensors(release):
    """{name: tensor} as the files of a folder name them, still on the disk where the file can be mapped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors = {}
    for path in (release.path / name for name in release.sha256 if not name.endswith(".json")):
        if is_torch(path) or path.suffix == ".bin":
            saved = state_dict_in(load_saved(path, True, "file of weights", "take another copy"))
            if saved is None:
                sys.exit(f"error: {path} holds more than the tensors of a network, or none: take another copy")
            tensors |= saved
            continue
        try:
            tensors |= load_file(path)
        except (SafetensorError, KeyError, AttributeError, OSError) as error:  # the middle two: an unknown dtype
            sys.exit(f"error: {path} is not a whole safetensors file: {first_line(error)}")
    return tensors


WRAPPERS = {  # what a module around the network puts before every name: how the names then begin
    "_orig_mod.": ("_orig_mod.",),  # torch.compile
    "module.": ("module.",),  # DistributedDataParallel
    "base_model.model.": ("base_model.model.",),  # peft
    "model.": ("model.model.", "model.lm_head."),  # one that calls the network self.model, as Lightning's often do
}
STRANGERS = {  # part of a tensor's name: what has such tensors, and the way out
    "lora_A": "has a LoRA adapter that is not merged: where it was trained, save model.merge_and_unload()",
    "qweight": "is quantised by GPTQ or AWQ: take the network as it was before, or a GGUF of it",
    "absmax": "is quantised by bitsandbytes: take the network as it was before, or a GGUF of it",
    "scales": "is quantised by MLX: take the network as it was before, or a GGUF of it",
    "tok_embeddings": "has Meta's names and order of rows: take the copy made for transformers, a model.safetensors",
    "wte": "is a GPT-2 or has litgpt's names: model.py takes a Llama with the names of transformers",
}


def prefix_of(names):
    """What modules around the network put before every name: "module._orig_mod.", or "" for nothing."""
    for added, begins in WRAPPERS.items():
        if names and all(name.startswith(begins) for name in names):
            return added + prefix_of([name.removeprefix(added) for name in names])
    return ""


def without_prefix(tensors):
    """The tensors under the names that they have in model.py."""
    prefix = prefix_of(tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def about_prefix(tensors, path):
    """
    A line about the prefix that is left out of the tensors' names, or "". Ends the program with one line if the names
    tell of another kind of network.
    """
    for name in tensors:
        for part in name.split("."):
            if part in STRANGERS:
                sys.exit(f"error: the network in {path} {STRANGERS[part]} (it holds {name})")
    prefix = prefix_of(tensors)
    return f"\n          names of tensors read without their prefix {prefix}" if prefix else ""


def head_is_tied(tensors):
    """True if there is no lm_head.weight, or if it repeats embed_tokens, as some files do."""
    head = tensors.get("lm_head.weight")
    return head is None or torch.equal(head, tensors.get("model.embed_tokens.weight", torch.empty(0)))


def without_head(tensors, path):
    """The tensors without a repeated tied head; ends the program with one line if the head is not tied."""
    if "lm_head.weight" in tensors and "model.embed_tokens.weight" not in tensors:
        sys.exit(f"error: {path} has lm_head.weight, but no model.embed_tokens.weight: it is not a whole network")
    if not head_is_tied(tensors):
        sys.exit(f"error: {path} has an lm_head.weight of its own: model.py ties it to embed_tokens")
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


# ---------------------------------------------------------------------------------------------
# config.json


def read_settings(config):
    """
    Every setting of a Llama config.json (a dict) that bears on the network, with absent ones as transformers
    takes them. Raises KeyError, TypeError or ValueError if it describes no network.
    """

    def given(name, default):  # null means "absent"
        value = config.get(name)
        return default if value is None else value

    for name in NAMES:
        if isinstance(config.get(name), list | dict):
            raise ValueError(f"{name} is {reprlib.repr(config[name])}: it must be a number")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    ModelConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=1)  # checked before they are divided
    rope, scaling = rope_settings(config, "rope_parameters"), rope_settings(config, "rope_scaling")
    thetas = [place["rope_theta"] for place in (config, rope, scaling) if place.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas[1:]):
        raise ValueError(f"rope_theta is said to be {' and '.join(map(reprlib.repr, thetas))}")
    rotated = [place["partial_rotary_factor"] for place in (config, rope, scaling) if "partial_rotary_factor" in place]
    layers = config.get("layer_types")
    plain = isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    scaled = [place for place in (scaling, rope) if place.get("rope_type", place.get("type", "default")) != "default"]
    numbers = ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=given("num_key_value_heads", heads),
        head_dim=given("head_dim", hidden // heads),
        max_position_embeddings=config.get("max_position_embeddings", 2_048),
        rope_theta=thetas[0] if thetas else 10_000.0,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        initializer_range=config.get("initializer_range", 0.02),
    )
    others = {name: given(name, value) for name, value in COMPUTED.items()}
    floats = {name: float(getattr(numbers, name)) for name in ("rope_theta", "rms_norm_eps", "initializer_range")}
    return (
        asdict(numbers)
        | floats
        | others
        | {
            "rope_scaling": scaled[0] if scaled else None,
            "layer_types": None if plain else layers,
            "partial_rotary_factor": next((share for share in rotated if share not in (None, 1)), 1),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
        }
    )


def rope_settings(config, name):
    """config[name], a dict; {} if it is absent or null. Raises ValueError if it is something else."""
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{name} is {reprlib.repr(found)}: it must be null or an object of plain values")
    return found


COMPUTED = {  # what model.py does, whatever its settings; but for tie_word_embeddings, also what an absent name means
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    # Fields of the Llama's relatives, each of which would make it another network.
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "quantization": None,  # MLX's
    "sliding_window": None,
    "layer_types": None,  # or all of them "full_attention"
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "attention_multiplier": None,
    "no_rope_layers": None,
    "num_local_experts": None,
    "use_qk_norm": False,
    "clip_qkv": None,
}


def config_from_json(config, file="config.json"):
    """ModelConfig of a config.json (a dict). Ends the program with one line if model.py does not do what it says."""
    way_out = "name a network of SmolLM2's kind"
    try:
        settings = read_settings(config)
        for name, value in COMPUTED.items():
            if settings[name] != value:
                said = reprlib.repr(settings[name])
                if name.startswith("quantization"):
                    how = settings[name].get("quant_method") if isinstance(settings[name], dict) else None
                    by = "MLX" if name == "quantization" else how or "an unknown method"
                    way_out = f"it is quantised by {by}: take the network as it was before, or a GGUF of it"
                sys.exit(f"error: {file} says {name} = {said}, which model.py does not do: {way_out}")
        return ModelConfig(**{name: settings[name] for name in NAMES})
    except KeyError as error:
        sys.exit(f"error: {file} has no {error.args[0]}: {way_out}")
    except ValueError as error:
        sys.exit(f"error: {file} describes no network: {first_line(error)[:240]}: {way_out}")


def config_to_json(config, **more):
    """The fields of a config.json, a dict, for a ModelConfig; `more` adds fields that it does not know."""
    known = {name: asdict(config)[name] for name in NAMES}
    fixed = {name: COMPUTED[name] for name in ("model_type", "hidden_act", "attention_bias", "tie_word_embeddings")}
    return dict(architectures=["LlamaForCausalLM"]) | fixed | known | more
