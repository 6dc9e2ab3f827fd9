"""export.py: what transformers makes of the folder is the network that the checkpoint holds."""

import base64
import hashlib
import json
import re
import resource
import shutil
import sys
import warnings
from dataclasses import asdict, replace

import huggingface_hub
import pytest
import torch
import transformers
from networks import load, refusal
from test_official import Hub, HubHandler, point_to

import export
import model as model_py
import sample
from configurator import configure
from export import ExportConfig
from lib import official
from lib.chat import TEMPLATE
from lib.checkpoint import write_checkpoint
from lib.gguf import header_value
from lib.official import wheel_gguf
from lib.tokenizer import TOKENIZER_SHA256, encode, load_tokenizer, tokenizer_json
from lib.weights import find_weights, load_network
from model import ModelConfig, SmolLM2
from sample import SampleConfig

TEXT = "def main(): return 2024  # “naïve”"


CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=128, rope_theta=7e4,
)  # fmt: skip
CHAT = {"official": "base", "sha256": TOKENIZER_SHA256, "chat": True}  # as train.py writes it


def write(path, model, **more):
    """The network's checkpoint, as train.py would save it."""
    settings = asdict(model.config) | {"dataset": "text", "learning_rate": 0.125}
    run = dict(optimizer={}, scheduler={}, iter_num=7, config=settings, data={})
    write_checkpoint(path, dict(model=model.state_dict()) | run | more)


def loud(config):
    """A network whose logits a wrong detail changes by more than rounding."""
    torch.manual_seed(0)
    model = SmolLM2(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.2)
    return model


@pytest.fixture
def quiet(caplog):
    """What transformers and Python warn of in the test is an error."""
    transformers.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    transformers.logging.disable_propagation()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.fixture
def trained(tmp_path):
    """(the network, the path of its checkpoint)"""
    model = loud(CONFIG)
    write(tmp_path / "ckpt.pt", model)
    return model, tmp_path / "ckpt.pt"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_same_network(trained, dtype, capsys, quiet):
    model, path = trained
    export.main(configure(ExportConfig, [f"--out_dir={path.parent}", f"--dtype={dtype}"]))
    folder = path.parent / "export"
    assert f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}" in capsys.readouterr().out
    peer, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == getattr(torch, dtype)
    assert (peer.config.bos_token_id, peer.generation_config.eos_token_id, peer.config.pad_token_id) == (0, 0, None)
    idx = torch.randint(49_152, (2, 64))
    with torch.no_grad():
        for p in model.parameters():  # what is left of them in the file
            p.copy_(p.to(peer.dtype))
        assert torch.allclose(model(idx), peer.float()(idx).logits, atol=1e-4)
        assert torch.equal(model(idx), load(folder)(idx))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).input_ids == encode(load_tokenizer(), TEXT)
    assert tokenizer.clean_up_tokenization_spaces is False  # transformers 4 would turn " ," into ","
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.chat_template is None


def test_a_chat_model_stops_where_it_should(trained, quiet):
    """The special ids and the template of the wheel's own header, in the words of transformers."""
    model, path = trained
    write(path, model, tokenizer=CHAT)
    folder = path.parent / "export"
    export.main(ExportConfig(out_dir=str(path.parent)))
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    header = {name: header_value(wheel_gguf(), f"tokenizer.{name}") for name in (
        "chat_template", "ggml.bos_token_id", "ggml.eos_token_id", "ggml.padding_token_id",
    )}  # fmt: skip
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    for where in (peer.config, peer.generation_config, tokenizer):
        assert [getattr(where, name) for name in ids] == list(header.values())[1:] == [1, 2, 2]
    assert tokenizer.chat_template == header["chat_template"] == TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    T = prompt["input_ids"].shape[1]

    def im_end_third(ids, scores):
        return scores.index_fill(1, torch.tensor(2), 1e9 if ids.shape[1] == T + 2 else -1e9)

    new = peer.generate(**prompt, max_new_tokens=9, do_sample=False, logits_processor=[im_end_third])[0, T:]
    assert len(new) == 3 and new[-1] == 2


def test_the_card_has_the_runs_numbers(trained):
    path = trained[1]
    path.with_name("log.csv").write_text("iter,loss,lr,grad_norm,val_loss,ms,tok_per_s\n5,,,,4.5,,\n7,,,,3.25,,\n")
    export.main(ExportConfig(out_dir=str(path.parent)))
    card = (path.parent / "export/README.md").read_text()
    for line in ("# export", "| parameters | 3,232,064 |", "| iteration | 7 |", "| trained on | text |",
                 "| val loss | 3.2500 nats per token |", "learning_rate = 0.125"):  # fmt: skip
        assert line in card.splitlines(), line
    code = card.split("```python\n")[1].split("```")[0].replace('"export"', repr(str(path.parent / "export")))
    exec(code.replace("max_new_tokens=100", "max_new_tokens=2"), {})  # what a reader copies


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """(a network, its folder, its tokenizer.json), with padded rows, tokens, special ids and a template of its own."""
    path = tmp_path_factory.mktemp("stranger")
    model = loud(replace(CONFIG, vocab_size=49_216))
    write(path / "ckpt.pt", model)
    export.main(ExportConfig(out_dir=str(path)))
    tokenizer = json.loads((path / "export/tokenizer.json").read_bytes())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    tokenizer["added_tokens"] += [
        {"id": 49_152, "content": "<|tool|>", **flags, "special": True},
        {"id": 49_153, "content": "<think>", **flags, "special": False},
    ]
    say(path / "export", tokenizer=tokenizer, generation_config={"eos_token_id": [49_152, 0]})
    say(path / "export", tokenizer_config={"chat_template": "{{ messages }}"})
    return model, path / "export", tokenizer


def say(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=2))


def test_what_a_folder_says_of_itself_is_kept(stranger, tmp_path, quiet):
    folder = stranger[1]
    again = tmp_path / "again"
    export.main(ExportConfig(init_from=str(folder), to=str(again)))
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    peer = transformers.AutoModelForCausalLM.from_pretrained(again)
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    assert theirs("<think>a<|tool|>").input_ids == [49_153, 81, 49_152] and theirs.eos_token == "<|tool|>"
    assert peer.generation_config.eos_token_id == [49_152, 0] and theirs.chat_template == "{{ messages }}"
    (again / "tokenizer_config.json").write_text("{}")
    (again / "chat_template.jinja").write_text("{{ 'newer' }}")
    assert find_weights(str(again)).chat_template == "{{ 'newer' }}"


@pytest.mark.parametrize("changes, words", [
    (dict(generation_config={"eos_token_id": 49_154}), "eos_token_id = 49154, which is no token"),
    (dict(generation_config={"eos_token_id": [2, "</s>"]}), "eos_token_id = [2, '</s>'], which is no token"),
    (dict(generation_config={"eos_token_id": 2, "pad_token_id": [2]}), "pad_token_id = [2], which is no token"),
    (dict(tokenizer_config={"chat_template": [{"name": "default"}]}), "it must be one Jinja text"),
    (dict(tokenizer={"model": {}}), "is not SmolLM2's"),
])  # fmt: skip
def test_a_folder_that_contradicts_itself_gets_one_line(changes, words, stranger, tmp_path):
    folder = shutil.copytree(stranger[1], tmp_path / "folder")
    say(folder, **changes)
    assert words in refusal(export.main, ExportConfig(init_from=str(folder), to=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_more_tokens_than_rows_get_one_line(tmp_path):
    write(tmp_path / "ckpt.pt", loud(replace(CONFIG, vocab_size=4_096)))
    message = refusal(export.main, ExportConfig(out_dir=str(tmp_path)))
    assert "has a vocabulary of 4,096, but its tokenizer has 49,152 tokens" in message


# ---- GGUF


@pytest.fixture(scope="module")
def exported_gguf(stranger):
    """(the stranger's network, its tokenizer.json, its .gguf)"""
    model, folder, tokenizer = stranger
    path = folder.parent / "a.gguf"
    export.main(configure(ExportConfig, [f"--init_from={folder}", "--format=gguf", f"--to={path}"]))
    return model, tokenizer, path


def test_a_gguf_is_read_back(exported_gguf):
    model, tokenizer, path = exported_gguf
    source = find_weights(str(path))
    back = load_network(source)
    assert asdict(back.config) == asdict(model.config) | {"initializer_range": back.config.initializer_range}
    for (name, ours), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert tokenizer_json(str(path))[0] == json.dumps(tokenizer, ensure_ascii=False, indent=2).encode()
    assert source.special_ids == dict(bos_token_id=0, eos_token_id=49_152)
    assert source.chat_template == "{{ messages }}"


def test_llama_cpp_says_the_same(exported_gguf):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, _, path = exported_gguf
    network = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    assert network.tokenize(TEXT.encode(), add_bos=True) == encode(load_tokenizer(), TEXT)
    assert network.metadata["tokenizer.chat_template"] == "{{ messages }}" and network.token_eos() == 49_152
    prompt = encode(load_tokenizer(), TEXT)
    ours = [i.item() for i in model.generate(torch.tensor([prompt]), 64, temperature=0)]
    network.eval(prompt)
    theirs = []
    for _ in range(64):
        theirs.append(int(network.scores[network.n_tokens - 1].argmax()))
        network.eval(theirs[-1:])
    assert theirs == ours
    with torch.no_grad():
        expected = model(torch.tensor([prompt + ours]))[0]
    error = (torch.tensor(network.scores[: len(expected)]) - expected).norm() / expected.norm()
    assert error < 1e-4, error
    network.close()


@pytest.mark.parametrize("flags, words", [
    (["--dtype=q8_0"], "--dtype=q8_0 is a type of GGUF files: add --format=gguf"),
    (["--to=a.gguf"], "a GGUF file's name ends in .gguf"),
    (["--format=gguf", "--to=a"], "a GGUF file's name ends in .gguf"),
    (["--push=me"], "--push=me does not name a repository of the Hub"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        export.main(configure(ExportConfig, flags))
    assert stop.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- The Hub


class Uploads(HubHandler):
    """The Hub's side of an upload: the large files by git LFS, the others inside the commit."""

    def do_POST(self):
        hub, content = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.posts.append((self.path, self.headers["Authorization"]))
        if hub.refuses and hub.refuses in self.path:
            return self.reply(403, {"error": "You have no write access"})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            return self.reply(200, {"url": f"{hub.url}/{asked['organization']}/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        repo = self.path.removeprefix("/api/models/").split("/preupload/")[0].split("/commit/")[0]
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(content)["files"]]
            mode = {name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode[name], "shouldIgnore": False} for name in names]
            return self.reply(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            files = json.loads(content)["objects"]
            upload = [file | {"actions": {"upload": {"href": f"{hub.url}/lfs/{file['oid']}"}}} for file in files]
            return self.reply(200, {"objects": upload, "transfer": "basic"})
        (hub.folder / repo).mkdir(parents=True, exist_ok=True)
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                (hub.folder / repo / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                (hub.folder / repo / line["value"]["path"]).write_bytes(hub.large[line["value"]["oid"]])
        self.reply(200, {"success": True, "commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": 40 * "1"})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/lfs/{hashlib.sha256(content).hexdigest()}"
        self.server.large[self.path.removeprefix("/lfs/")] = content
        self.reply(200, {})

    def reply(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(tmp_path / "served")
    server.RequestHandlerClass, server.posts, server.large, server.refuses = Uploads, [], {}, None
    point_to(server.url, tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.close()
    huggingface_hub.close_session()
    official.hub_problem.cache_clear()


def test_what_is_pushed_is_what_the_hub_gives_back(trained, hub, capsys):
    model, path = trained
    write(path, model, tokenizer=CHAT)
    export.main(configure(ExportConfig, [f"--out_dir={path.parent}", "--push=me/tiny"]))
    assert f"uploaded to {hub.url}/me/tiny" in capsys.readouterr().out
    assert {token for _, token in hub.posts} == {"Bearer hf_secret"}
    folder = path.parent / "export"
    assert {file.name: file.read_bytes() for file in (hub.folder / "me/tiny").iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    assert 'from_pretrained("me/tiny")' in (folder / "README.md").read_text()
    source = find_weights("hub:me/tiny")
    assert source.special_ids == dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    assert source.chat_template == TEMPLATE
    for name, tensor in load_network(source).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_hub_that_refuses_gets_one_line_and_the_folder_stays(trained, hub):
    hub.refuses = "/commit/"
    command = ExportConfig(out_dir=str(trained[1].parent), push="me/tiny")
    message = refusal(export.main, command)
    assert "export is whole, but the Hub did not take it" in message and "hf upload me/tiny" in message
    assert (trained[1].parent / "export/config.json").is_file()


def test_nothing_is_written_or_pushed_without_a_token(trained, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(export.main, ExportConfig(out_dir=str(trained[1].parent), push="me/tiny"))
    assert "--push needs your token of the Hub: log in with `hf auth login`, or set HF_TOKEN" in message
    assert not hub.posts and not (trained[1].parent / "export").exists()


def test_sample_reads_it(trained, capfd):
    export.main(ExportConfig(out_dir=str(trained[1].parent)))
    folder = trained[1].parent / "export"
    sample.main(configure(SampleConfig, [f"--init_from={folder}", "--max_new_tokens=3", "--device=cpu"]))
    assert "--- 3 tokens in" in capfd.readouterr().out


@pytest.mark.parametrize("form, name", [("hf", "export"), ("gguf", "export.gguf")])
def test_an_export_is_not_overwritten(form, name, trained):
    (trained[1].parent / name).mkdir()
    with pytest.raises(SystemExit, match=f"^error: .*{name} is there already: move it away"):
        export.main(ExportConfig(out_dir=str(trained[1].parent), format=form))


@pytest.mark.parametrize("form, bytes", [("hf", 500), ("gguf", 500), ("gguf", 10**7)])  # the header, then the tensors
def test_a_full_disk(form, bytes, trained):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, limits[1]))  # the file system's own error, without filling a disk
    try:
        with pytest.raises(SystemExit, match=r"^error: .*export(.gguf)? could not be written \(.*: (free|the disk is)"):
            export.main(ExportConfig(out_dir=str(trained[1].parent), format=form))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in trained[1].parent.iterdir()] == ["ckpt.pt"]


# ---- A network that is no longer a Llama


class WithQKNorm(model_py.Attention):
    def __init__(self, config):
        super().__init__(config)
        self.q_norm = model_py.RMSNorm(config.head_dim, config.rms_norm_eps)


def gelu(self, x):
    return self.down_proj(torch.nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("change, message", [
    (("Attention", WithQKNorm), "model.layers.0.self_attn.q_norm.weight is [32], but a Llama has no such tensor"),
    (("MLP.forward", gelu), "transformers' Llama computes other logits from these weights"),
])  # fmt: skip
def test_a_changed_network_is_not_called_a_llama(change, message, monkeypatch, tmp_path, hub):
    monkeypatch.setattr(f"model.{change[0]}", change[1])
    torch.manual_seed(0)
    write(tmp_path / "ckpt.pt", SmolLM2(CONFIG))
    with pytest.raises(SystemExit, match=re.escape(message) + ".*: model.py was changed"):
        export.main(ExportConfig(out_dir=str(tmp_path), push="me/tiny"))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"] and not hub.posts


def test_without_transformers_it_says_what_was_not_compared(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    export.main(ExportConfig(out_dir=str(trained[1].parent)))
    assert "not compared with transformers, which is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("script, config", [(export, ExportConfig), (sample, SampleConfig)])
def test_another_tokenizer_is_refused(script, config, trained):
    checkpoint = torch.load(trained[1], weights_only=True) | {"tokenizer": {"official": "base", "sha256": "0123"}}
    write_checkpoint(trained[1], checkpoint)
    with pytest.raises(SystemExit, match="^error: these weights need the tokenizer with sha256 0123, but base"):
        script.main(config(out_dir=str(trained[1].parent)))
    assert [path.name for path in trained[1].parent.iterdir()] == ["ckpt.pt"]
