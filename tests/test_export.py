"""export.py: transformers and llama.cpp load the checkpoint's model from an export."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import warnings
from dataclasses import asdict, replace
from configurator import configure

import pytest
import torch
import transformers
from networks import load, refusal, save_checkpoint

import export
import model as model_py
from export import ExportConfig
from lib.chat import TEMPLATE
from lib.gguf import read_header
from lib.official import wheel_gguf
from lib.tokenizer import encode, load_tokenizer, tokenizer_json
from lib.weights import find_weights
from model import ModelConfig, SmolLM2

TEXT = "def main(): return 2024  # “naïve”"
CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=128, rope_theta=7e4, initializer_range=0.2,
)  # fmt: skip


def write(folder, config=CONFIG, chat=False):
    """Write a checkpoint of a model that reveals a wrong detail. Return the model."""
    torch.manual_seed(0)
    return save_checkpoint(folder, SmolLM2(config), chat=chat, learning_rate=0.125)


@pytest.fixture
def quiet(caplog):
    """Make transformers' and Python's warnings errors."""
    transformers.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    transformers.logging.disable_propagation()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_same_model(tmp_path, dtype, capsys, quiet):
    model, folder = write(tmp_path), tmp_path / "it's mine"
    export.main(configure(ExportConfig, [f"--out_dir={tmp_path}", f"--to={folder}", f"--dtype={dtype}"]))
    output = capsys.readouterr().out
    assert f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}" in output
    call, command = re.search(r"to load: transformers\.AutoModelForCausalLM\.(.*), or (.*)", output).groups()
    assert eval(call, {"from_pretrained": str}) == str(folder)
    assert shlex.split(command) == ["python", "sample.py", f"--init_from={folder}"]
    peer, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == getattr(torch, dtype)
    assert (peer.config.bos_token_id, peer.generation_config.eos_token_id, peer.config.pad_token_id) == (0, 0, None)
    idx = torch.randint(49_152, (2, 64))
    with torch.no_grad():
        for p in model.parameters():  # rounded as in the file
            p.copy_(p.to(peer.dtype))
        assert torch.allclose(model(idx), peer.float()(idx).logits, atol=1e-4)
        assert torch.equal(model(idx), load(folder)(idx))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).input_ids == encode(load_tokenizer(), TEXT)
    assert tokenizer.clean_up_tokenization_spaces is False  # transformers 4 would turn " ," into ","
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.chat_template is None
    card = (folder / "README.md").read_text().splitlines()
    for line in ("# it's mine", "| parameters | 3,232,064 |", "| iteration | 7 |", "| trained on | text |",
                 "| best val loss | 1.0000 nats per token |", "learning_rate = 0.125"):  # fmt: skip
        assert line in card, line


def test_a_chat_model_keeps_its_template_and_its_ends(tmp_path, quiet):
    """They equal the ones in the wheel's header."""
    write(tmp_path, chat=True)
    export.main(ExportConfig(out_dir=str(tmp_path)))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = [read_header(wheel_gguf(), f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")]
    for holder in (peer.config, peer.generation_config, tokenizer):
        assert [holder.bos_token_id, holder.eos_token_id, holder.pad_token_id] == ids == [1, 2, 2]
    assert tokenizer.chat_template == read_header(wheel_gguf(), "tokenizer.chat_template") == TEMPLATE


# ---- A folder with its own tokens, special ids and template


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Return (a model, its folder, its tokenizer.json), with padded rows and its own tokens."""
    path = tmp_path_factory.mktemp("stranger")
    model = write(path, replace(CONFIG, vocab_size=49_216))
    export.main(ExportConfig(out_dir=str(path)))
    tokenizer = json.loads((path / "export/tokenizer.json").read_bytes())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    tokenizer["added_tokens"] += [
        {"id": 49_152, "content": "<|tool|>", **flags, "special": True},
        {"id": 49_153, "content": "<think>", **flags, "special": False},
    ]
    change(path / "export", tokenizer=tokenizer, generation_config={"eos_token_id": [49_152, 0]})
    change(path / "export", tokenizer_config={"chat_template": "{{ messages }}"})
    return model, path / "export", tokenizer


def change(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=2))


def test_a_folders_own_tokens_are_kept(stranger, tmp_path, quiet):
    folder, again = stranger[1], tmp_path / "again"
    export.main(ExportConfig(init_from=str(folder), to=str(again)))
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    peer = transformers.AutoModelForCausalLM.from_pretrained(again)
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    assert theirs("<think>a<|tool|>").input_ids == [49_153, 81, 49_152] and theirs.eos_token == "<|tool|>"
    assert peer.generation_config.eos_token_id == [49_152, 0] and theirs.chat_template == "{{ messages }}"


@pytest.mark.parametrize("changes, words", [
    (dict(generation_config={"eos_token_id": [2, 49_154]}), "eos_token_id = [2, 49154] is not a token"),
    (dict(generation_config={"eos_token_id": 2, "pad_token_id": [2]}), "pad_token_id = [2] is not a token"),
    (dict(tokenizer={"model": {}}), "tokenizer"),
])  # fmt: skip
def test_a_folder_that_contradicts_itself_gets_one_line(changes, words, stranger, tmp_path):
    folder = shutil.copytree(stranger[1], tmp_path / "folder")
    change(folder, **changes)
    message = refusal(export.main, ExportConfig(init_from=str(folder), to=str(tmp_path / "again")))
    assert words in message and str(folder) in message and not (tmp_path / "again").exists()


def test_more_tokens_than_rows_get_one_line(tmp_path):
    write(tmp_path, replace(CONFIG, vocab_size=4_096))
    message = refusal(export.main, ExportConfig(out_dir=str(tmp_path)))
    assert "its tokenizer has 49,152 tokens, its model 4,096" in message


@pytest.fixture(scope="module")
def exported_gguf(stranger):
    """Return the path of the stranger's .gguf."""
    path = stranger[1].parent / "a.gguf"
    export.main(configure(ExportConfig, [f"--init_from={stranger[1]}", "--format=gguf", f"--to={path}"]))
    return path


def test_a_gguf_is_read_back(stranger, exported_gguf):
    (model, _, tokenizer), path = stranger, exported_gguf
    source, back = find_weights(str(path)), load(path)
    assert asdict(back.config) == asdict(model.config) | {"initializer_range": back.config.initializer_range}
    for ours, theirs in zip(model.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert tokenizer_json(path)[0] == json.dumps(tokenizer, ensure_ascii=False, indent=2).encode()
    assert source.special_ids == dict(bos_token_id=0, eos_token_id=49_152)
    assert source.chat_template == "{{ messages }}"


def test_llama_cpp_computes_the_same(stranger, exported_gguf):
    llama_cpp = pytest.importorskip("llama_cpp")
    options = dict(n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    peer = llama_cpp.Llama(str(exported_gguf), **options)
    assert peer.metadata["tokenizer.chat_template"] == "{{ messages }}" and peer.token_eos() == 49_152
    prompt = encode(load_tokenizer(), TEXT)
    assert peer.tokenize(TEXT.encode(), add_bos=True) == prompt
    peer.eval(prompt)
    with torch.no_grad():
        expected = stranger[0](torch.tensor([prompt]))[0]
    assert (torch.tensor(peer.scores[: len(prompt)]) - expected).norm() < 1e-4 * expected.norm()
    peer.close()


@pytest.mark.parametrize("flags, words", [
    (["--dtype=q8_0"], "--dtype=q8_0 is for GGUF files: add --format=gguf"),
    (["--to=a.gguf"], "a GGUF file's name ends in .gguf"),
    (["--format=gguf", "--to=a"], "a GGUF file's name ends in .gguf"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        export.main(configure(ExportConfig, flags))
    assert stop.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_export_is_not_overwritten(tmp_path):
    for form, name in (("hf", "export"), ("gguf", "export.gguf")):
        (tmp_path / name).mkdir()
        message = refusal(export.main, ExportConfig(out_dir=str(tmp_path), format=form))
        assert f"{name} exists already: move it away" in message


@pytest.mark.parametrize("form, bytes", [("hf", 500), ("gguf", 500), ("gguf", 10**7)])  # the header, then the tensors
def test_a_full_disk(form, bytes, tmp_path):
    write(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, limits[1]))  # the file system's own error, without filling a disk
    try:
        with pytest.raises(SystemExit, match=r"^error: .*export(.gguf)? could not be written \(.*: (free|the disk is)"):
            export.main(ExportConfig(out_dir=str(tmp_path), format=form))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("flags, value, fits", [
    (["--dtype=float16"], 1e5, False), (["--dtype=bfloat16"], 1e5, True), (["--dtype=float16"], 6.5e4, True),
    (["--dtype=q8_0", "--format=gguf"], 8.4e6, False), (["--dtype=q8_0", "--format=gguf"], 8.3e6, True),
])  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_before_anything_is_written(flags, value, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_logits", str)  # slow, and not tested here
    model = write(tmp_path, replace(CONFIG, num_hidden_layers=1))
    model.state_dict()["model.layers.0.mlp.down_proj.weight"][2, 3] = -value
    save_checkpoint(tmp_path, model)
    config = configure(ExportConfig, [f"--out_dir={tmp_path}", *flags])
    if fits:
        return export.main(config)
    message = refusal(export.main, config)
    dtype = flags[0].removeprefix("--dtype=")
    assert f"down_proj.weight has the value {value:.3g}, which does not fit {dtype}: use --dtype=bfloat16" in message
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("form, name", [("hf", "export"), ("gguf", "export.gguf")])
def test_the_next_export_cleans_up_after_a_killed_one(form, name, tmp_path, monkeypatch):
    write(tmp_path, replace(CONFIG, num_hidden_layers=1))
    config = ExportConfig(out_dir=str(tmp_path), format=form)
    parent = os.getpid()
    monkeypatch.setattr(export, "check_logits", lambda path: os.getpid() == parent or os.kill(os.getpid(), 9))
    if (child := os.fork()) == 0:
        export.main(config)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sum(path.stat().st_size > 10**7 for path in tmp_path.rglob("*")) == 2
    export.main(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", name]


def add_norm(self, config, init=model_py.Attention.__init__):
    init(self, config)
    self.q_norm = model_py.RMSNorm(config.head_dim, config.rms_norm_eps)


def remove_norm(self, config, init=model_py.Block.__init__):
    init(self, config)
    self.post_attention_layernorm = torch.nn.Identity()


def gelu(self, x):
    return self.down_proj(torch.nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("form, change, message", [
    ("hf", ("Attention.__init__", add_norm), "self_attn.q_norm is in only one of model.py and transformers' Llama"),
    ("gguf", ("Block.__init__", remove_norm), "post_attention_layernorm is in only one of model.py and"),
    ("hf", ("MLP.forward", gelu), "transformers' Llama computes different logits (relative error"),
    ("gguf", ("MLP.forward", gelu), "transformers' Llama computes different logits (relative error"),
])  # fmt: skip
def test_a_changed_model_is_not_called_a_llama(form, change, message, monkeypatch, tmp_path):
    monkeypatch.setattr(f"model.{change[0]}", change[1])
    write(tmp_path)
    error = refusal(export.main, ExportConfig(out_dir=str(tmp_path), format=form))
    assert f"error: {message}" in error and error.endswith(": model.py is no longer a Llama")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_without_transformers_it_reports_a_missing_comparison(tmp_path, capsys, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    export.main(ExportConfig(out_dir=str(tmp_path)))
    assert "not compared with transformers, which is not installed" in capsys.readouterr().out
