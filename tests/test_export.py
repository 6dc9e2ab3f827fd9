"""export.py: what transformers makes of the folder is the network that the checkpoint holds."""

import re
import resource
import sys
from dataclasses import asdict

import pytest
import torch
import transformers
from networks import load

import export
import model as model_py
import sample
from configurator import configure
from export import ExportConfig
from lib.checkpoint import write_checkpoint
from lib.tokenizer import encode, load_tokenizer
from model import ModelConfig, SmolLM2
from sample import SampleConfig

TEXT = "def main(): return 2024  # “naïve”"


CONFIG = ModelConfig(
    hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=64, rope_theta=7e4,
)  # fmt: skip


def write(path, model):
    """The network's checkpoint, as train.py would save it."""
    settings = asdict(model.config) | {"dataset": "text"}
    write_checkpoint(
        path, dict(model=model.state_dict(), optimizer={}, scheduler={}, iter_num=7, config=settings, data={})
    )


@pytest.fixture
def trained(tmp_path):
    """(the network, the path of its checkpoint)"""
    torch.manual_seed(0)
    model = SmolLM2(CONFIG)
    write(tmp_path / "ckpt.pt", model)
    return model, tmp_path / "ckpt.pt"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_same_network(trained, dtype, capsys):
    model, path = trained
    export.main(configure(ExportConfig, [f"--out_dir={path.parent}", f"--dtype={dtype}"]))
    folder = path.parent / "export"
    assert f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}" in capsys.readouterr().out
    peer, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == getattr(torch, dtype)
    idx = torch.randint(49_152, (2, 64))
    with torch.no_grad():
        for p in model.parameters():  # what is left of them in the file
            p.copy_(p.to(peer.dtype))
        assert torch.allclose(model(idx), peer.float()(idx).logits, atol=1e-5)
        assert torch.equal(model(idx), load(folder)(idx))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).input_ids == encode(load_tokenizer(), TEXT)


def test_sample_reads_it(trained, capfd):
    export.main(ExportConfig(out_dir=str(trained[1].parent)))
    folder = trained[1].parent / "export"
    sample.main(configure(SampleConfig, [f"--init_from={folder}", "--max_new_tokens=3", "--device=cpu"]))
    assert "--- 3 tokens in" in capfd.readouterr().out


def test_an_export_is_not_overwritten(trained):
    (trained[1].parent / "export").mkdir()
    with pytest.raises(SystemExit, match="^error: .*export is there already: move it away"):
        export.main(ExportConfig(out_dir=str(trained[1].parent)))


def test_a_full_disk(trained):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # the file system's own error, without filling a disk
    try:
        with pytest.raises(SystemExit, match=r"^error: .*export could not be written \(.*: free some disk"):
            export.main(ExportConfig(out_dir=str(trained[1].parent)))
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
    (("Attention", WithQKNorm), "model.layers.0.self_attn.q_norm.weight is [16], but a Llama has no such tensor"),
    (("MLP.forward", gelu), "transformers' Llama computes other logits from these weights"),
])  # fmt: skip
def test_a_changed_network_is_not_called_a_llama(change, message, monkeypatch, tmp_path):
    monkeypatch.setattr(f"model.{change[0]}", change[1])
    torch.manual_seed(0)
    write(tmp_path / "ckpt.pt", SmolLM2(CONFIG))
    with pytest.raises(SystemExit, match=re.escape(message) + ".*: model.py was changed"):
        export.main(ExportConfig(out_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


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
