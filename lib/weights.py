"""
Weights from anywhere: a name or a path goes in, the network with those weights comes out.

    source = find_weights("resume", out_dir="out")     # out/ckpt.pt; or "base", a folder, a .gguf, a .pt, ...
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from lib.checkpoint import check_tensors, read_checkpoint
from lib.errors import first_line
from lib.files import read_json
from model import ModelConfig, SmolLM2, rope_tables

NAMES = {field.name for field in fields(ModelConfig)}


@dataclass(frozen=True)
class Source:
    """Weights that were found but not yet read."""

    path: Path  # of the checkpoint, the folder or the file
    about: str  # what was found, in lines to print
    config: ModelConfig
    read: Callable  # () -> {name: tensor}
    tokenizer: dict  # the arguments of load_tokenizer


def find_weights(init_from, out_dir="out"):
    """
    The Source that `init_from` names: "resume" is out_dir/ckpt.pt; a .pt is a checkpoint; anything else is a
    release, as lib/official.py finds it. Ends the program with one line if there is none.
    """
    if init_from == "resume" or init_from.endswith(".pt"):
        path = Path(out_dir) / "ckpt.pt" if init_from == "resume" else Path(init_from)
        checkpoint = read_checkpoint(path, mmap=True, resume=False)
        dataset = checkpoint["config"].get("dataset", "unknown text")
        about = f"checkpoint: {path}, iteration {checkpoint['iter_num']:,}, trained on {dataset}"
        config = checkpoint_config(path, checkpoint)

        def read():
            check_tensors(path, {key: checkpoint[key] for key in ("model", "checksums")})
            return checkpoint["model"]

        return Source(path, about, config, read, checkpoint["tokenizer"])
    from lib.official import describe, find_release  # the Hub's client, imported only when needed

    release = find_release(init_from)
    about, read = describe(release), functools.partial(release_tensors, release)
    if dropout := read_config(release.path).get("attention_dropout"):  # it changes training alone, so it is no refusal
        about += f"\nnote: config.json says attention_dropout = {reprlib.repr(dropout)}; train.py has no dropout"
    return Source(release.path, about, release_config(release), read, {"official": init_from})


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
    return Source(release.path, release.title, release_config(release), read, {"official": release.asked})


def release_config(release):
    """The ModelConfig of a Release."""
    file = release.path if release.path.suffix == ".gguf" else release.path / "config.json"
    return config_from_json(read_config(release.path), file)


def read_config(path):
    """config.json of a folder as a dict; for a .gguf file, its header under the same names."""
    if path.suffix == ".gguf":
        from lib.gguf import read_gguf_config

        return read_gguf_config(path)
    return read_json(path / "config.json", "copy the release there again")


def release_tensors(release):
    """{name: tensor} under the release's names, in the file's dtype (fp32 from a GGUF)."""
    if release.path.suffix == ".gguf":
        from lib.gguf import read_gguf_tensors

        return read_gguf_tensors(release.path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors = {}
    for name in release.sha256:
        if name.endswith(".safetensors"):
            try:
                tensors |= load_file(release.path / name)
            except (SafetensorError, KeyError, AttributeError, OSError) as error:  # the middle two: an unknown dtype
                sys.exit(f"error: {release.path / name} is not a whole safetensors file: {first_line(error)}")
    return tensors


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
