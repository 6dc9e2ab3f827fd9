"""sample.py: text from the official weights as transformers writes it, from checkpoints, and its errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from configurator import configure
from lib.checkpoint import write_checkpoint
from model import ModelConfig, SmolLM2
from sample import SampleConfig


def run(capfd, *flags):
    """(exit code or message, what it printed between the rules)."""
    code = 0
    try:
        sample.main(configure(SampleConfig, ["--device=cpu", "--dtype=float32", *flags]))
    except SystemExit as exit:
        code = exit.code
    output = capfd.readouterr().out
    return code, re.findall(r"^---\n(.*?)\n---", output, re.M | re.S), output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small untrained network as train.py would save it."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, max_position_embeddings=32)  # fmt: skip
    folder = tmp_path_factory.mktemp("out")
    write_checkpoint(
        folder / "ckpt.pt",
        dict(model=SmolLM2(config).state_dict(), optimizer={}, scheduler={}, iter_num=7,
             config=vars(config) | {"dataset": "text"}, data={}),
    )  # fmt: skip
    return folder


def test_official_weights_greedily_as_transformers(capfd, real_model, hf_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8_192, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        )
    )  # fmt: skip
    peer.load_state_dict(real_model.state_dict(), strict=False)
    prompt = "The capital of France is"
    ids = torch.tensor([hf_tokenizer.encode(prompt).ids])
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=2,
                           pad_token_id=2)[0]  # fmt: skip
    code, texts, output = run(capfd, "--init_from=base", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=20")
    assert code == 0 and texts == [hf_tokenizer.decode(theirs.tolist())]
    assert "official: base = " in output and "sha256" in output and "20 tokens in" in output


def test_a_checkpoint(capfd, tiny):
    flags = [f"--out_dir={tiny}", "--max_new_tokens=50"]  # beyond the context of 32: the window slides
    code, texts, output = run(capfd, *flags, "--num_samples=2")
    assert code == 0 and len(texts) == 2 and texts[0] != texts[1]
    assert all(text.startswith("The") for text in texts)
    assert f"checkpoint: {tiny}/ckpt.pt, iteration 7, trained on text" in output
    assert run(capfd, *flags)[1] == texts[:1]  # the same seed, the same text
    assert run(capfd, *flags, "--seed=2")[1] != texts[:1]
    assert run(capfd, f"--init_from={tiny}/ckpt.pt", "--max_new_tokens=50")[1] == texts[:1]


def test_an_empty_prompt_begins_a_document(capfd, tiny):
    code, texts, _ = run(capfd, f"--out_dir={tiny}", "--prompt=", "--max_new_tokens=3")
    assert code == 0 and texts[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out_dir=nowhere"], r"there is no checkpoint nowhere/ckpt.pt"),
        (["--prompt=" + 40 * "one "], r"the prompt is too long: \d+ tokens do not fit a context of 32"),
        (["--init_from=bsae"], r"did you mean base"),
        (["--device=cuda:9"], r"device cuda:9 cannot be used"),
    ],
)
def test_errors(capfd, tiny, flags, message):
    out_dir = [] if "nowhere" in flags[0] else [f"--out_dir={tiny}"]
    code, _, _ = run(capfd, *out_dir, *flags)
    assert re.match("error: ", code) and re.search(message, code) and "\n" not in code


def test_without_a_compiler_it_goes_on(tiny, capfd, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    flags = [f"--out_dir={tiny}", "--prompt=The", "--max_new_tokens=5"]
    eager = run(capfd, *flags)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    code, texts, output = run(capfd, "--compile", *flags)
    assert code == 0 and texts == eager[1]
    assert "compile     not possible here (RuntimeError: no C++ compiler): eager instead" in output


def test_a_closed_stdout_ends_it_quietly(tiny):
    """python sample.py | head -1"""
    root = Path(sample.__file__).parent
    line = f"{sys.executable} sample.py --out_dir={tiny} --device=cpu --dtype=float32 --num_samples=9 | head -1"
    process = subprocess.run(["bash", "-c", line], cwd=root, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "error: out of memory (CUDA out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of memory ("),
    (MemoryError(), "error: out of memory (MemoryError)"),
])  # fmt: skip
def test_out_of_memory(tiny, error, message, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(SmolLM2, "hidden", full)
    with pytest.raises(SystemExit, match=re.escape(message) + ".*--dtype=bfloat16"):
        sample.main(SampleConfig(out_dir=str(tiny), dtype="float32", device="cpu"))


def test_an_error_that_is_not_out_of_memory_keeps_its_text(tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(SmolLM2, "hidden", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sample.main(SampleConfig(out_dir=str(tiny), dtype="float32", device="cpu"))
