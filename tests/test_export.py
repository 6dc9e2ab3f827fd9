"""export.py: what transformers makes of the folder is the network that the checkpoint holds."""

import resource

import pytest
import torch
import transformers

import export
import sample
from checkpoint import write_checkpoint
from configurator import configure
from export import ExportConfig
from model import ModelConfig, SmolLM2
from official import find_release, load_model
from sample import SampleConfig
from tokenizer import encode, load_tokenizer

TEXT = "def main(): return 2024  # “naïve”"


@pytest.fixture
def trained(tmp_path):
    """(the network, the path of its checkpoint)"""
    torch.manual_seed(0)
    shape = dict(hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    model = SmolLM2(ModelConfig(**shape, num_key_value_heads=2, max_position_embeddings=64, rope_theta=7e4))
    settings = vars(model.config) | {"dataset": "text"}
    write_checkpoint(
        tmp_path / "ckpt.pt",
        dict(
            model=model.state_dict(),
            optimizer={},
            scheduler={},
            iter_num=7,
            best_val_loss=1.0,
            config=settings,
            data={},
        ),
    )
    return model, tmp_path / "ckpt.pt"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_same_network(trained, dtype, capsys):
    model, path = trained
    export.main(configure(ExportConfig, [f"--ckpt={path}", f"--dtype={dtype}"]))
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
        assert torch.equal(model(idx), load_model(find_release(str(folder)))(idx))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).input_ids == encode(load_tokenizer(), TEXT)


def test_sample_reads_it(trained, capfd):
    export.main(ExportConfig(ckpt=str(trained[1])))
    folder = trained[1].parent / "export"
    sample.main(configure(SampleConfig, [f"--official={folder}", "--max_new_tokens=3", "--device=cpu"]))
    assert "--- 3 tokens in" in capfd.readouterr().out


def test_an_export_is_not_overwritten(trained):
    (trained[1].parent / "export").mkdir()
    with pytest.raises(SystemExit, match="^error: .*export is there already: move it away"):
        export.main(ExportConfig(ckpt=str(trained[1])))


def test_a_full_disk(trained):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # the file system's own error, without filling a disk
    try:
        with pytest.raises(SystemExit, match=r"^error: .*export could not be written \(.*: free some disk"):
            export.main(ExportConfig(ckpt=str(trained[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in trained[1].parent.iterdir()] == ["ckpt.pt"]
