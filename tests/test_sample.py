"""sample.py: text from the official weights as transformers writes it, from checkpoints, and its errors."""

import io
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch

import sample
from configurator import configure
from lib.checkpoint import write_checkpoint
from lib.gguf import open_gguf
from lib.official import wheel_gguf
from lib.terminal import HELP, converse
from lib.tokenizer import load_tokenizer
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
    return code, re.findall(r"^---\n(.*?)(?=\n---)", output, re.M | re.S), output


def checkpoint(folder, **shapes):
    """A small untrained network, saved to folder/ckpt.pt as train.py would."""
    torch.manual_seed(0)
    config = ModelConfig(**dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=1, head_dim=16, max_position_embeddings=32) | shapes)  # fmt: skip
    network = SmolLM2(config)
    save(folder, network)
    return network


def save(folder, network):
    config = vars(network.config) | {"dataset": "text"}
    state = dict(model=network.state_dict(), optimizer={}, scheduler={}, iter_num=7, config=config, data={})
    write_checkpoint(folder / "ckpt.pt", state)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    checkpoint(folder)
    return folder


def llama_of(network):
    """transformers' network with the real weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8_192, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        )
    )  # fmt: skip
    peer.load_state_dict(network.state_dict(), strict=False)
    return peer


def test_official_weights_greedily_as_transformers(capfd, real_model, hf_tokenizer):
    peer = llama_of(real_model)
    prompt = "The capital of France is"
    ids = torch.tensor([hf_tokenizer.encode(prompt).ids])
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=2,
                           pad_token_id=2)[0]  # fmt: skip
    code, texts, output = run(capfd, "--init_from=base", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=20")
    assert code == 0 and texts == [hf_tokenizer.decode(theirs.tolist())]
    assert "official: base = " in output and "sha256" in output and "20 tokens in" in output


def talk(capfd, monkeypatch, lines, *flags):
    """What a conversation prints after its first line."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code, _, output = run(capfd, "--chat=True", *flags)
    assert code == 0
    return output[output.index(HELP) + len(HELP) :]


def test_a_conversation(capfd, monkeypatch, real_model, hf_tokenizer):
    """Each answer is transformers' own to the whole conversation so far, in the release's template."""
    template = open_gguf(wheel_gguf()).get_field("tokenizer.chat_template").contents()
    peer = llama_of(real_model)
    expected, messages = [], []
    for question in ("What is the capital of France?", "And of Italy?", "/system Answer in French.", "And of Spain?"):
        if question.startswith("/"):
            messages.insert(0, dict(role="system", content="Answer in French."))
            continue
        messages.append(dict(role="user", content=question))
        text = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
        ids = torch.tensor([hf_tokenizer.encode(text).ids])
        theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                               eos_token_id=2, pad_token_id=2)[0, ids.shape[1] :]  # fmt: skip
        messages.append(dict(role="assistant", content=hf_tokenizer.decode(theirs.tolist())))
        expected.append(messages[-1]["content"])
    said = talk(
        capfd, monkeypatch,
        ["What is the capital of France?", "And of Italy?", "/system Answer in French.", "And of Spain?", "/foo"],
        "--init_from=base", "--temperature=0", "--max_new_tokens=12",
    )  # fmt: skip
    parts = [part.strip() for part in said.split("\n> ")]
    assert parts[1:3] + parts[4:5] == expected and "Paris" in expected[0]
    assert "Answer in French" in parts[3] and "/foo is no command" in parts[5]


def test_a_conversation_longer_than_the_context(capfd, monkeypatch, tmp_path):
    checkpoint(tmp_path, max_position_embeddings=128)
    said = talk(
        capfd, monkeypatch, ["one two three " * 4, "four five six " * 4, "seven " * 200, "/reset", "hello"],
        f"--out_dir={tmp_path}", "--max_new_tokens=40",
    )  # fmt: skip
    parts = said.split("\n> ")
    assert "1 of 1 earlier turns are forgotten" in parts[2] and "too long: " in parts[3]
    assert "a new conversation" in parts[4] and "forgotten" not in parts[5]


def test_ctrl_c_ends_the_reply_and_not_the_program(capfd, monkeypatch, tiny):
    def write(ids):
        yield ["half"]
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    converse(load_tokenizer(), "", 100, write)
    assert "half (stopped)\n\n> " in capfd.readouterr().out


def test_the_prompt_of_a_file_and_of_standard_input(capfd, monkeypatch, tiny, tmp_path):
    (tmp_path / "a.txt").write_text("Grüße,\nWelt\n", encoding="utf-8")
    flags = [f"--out_dir={tiny}", "--max_new_tokens=3"]
    texts = run(capfd, *flags, f"--prompt=@{tmp_path}/a.txt")[1]
    assert texts[0].startswith("Grüße,\nWelt")
    with open(tmp_path / "a.txt") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert run(capfd, *flags, "--prompt=-")[1] == texts
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in run(capfd, *flags, f"--prompt=@{tmp_path}/b.txt")[0]
    assert "No such file" in run(capfd, *flags, f"--prompt=@{tmp_path}/c.txt")[0]


@pytest.mark.parametrize("flag", [
    "--temperature=-0.1", "--temperature=nan", "--top_p=1.5", "--top_k=-2", "--repetition_penalty=0", "--num_samples=0",
])  # fmt: skip
def test_sampling_settings_are_checked_before_the_weights_load(flag, capfd):
    with pytest.raises(SystemExit) as exit:
        configure(SampleConfig, ["--out_dir=nowhere", flag])
    assert exit.value.code == 2 and "it must be a number from" in capfd.readouterr().err


def test_chat_has_the_cards_defaults():
    names = ("temperature", "top_k", "top_p")
    assert [getattr(configure(SampleConfig, ["--chat=True"]), name) for name in names] == [0.2, 0, 0.9]
    assert [getattr(configure(SampleConfig, ["--chat=True", "--top_k=5"]), name) for name in names] == [0.2, 5, 0.9]
    assert [getattr(configure(SampleConfig, []), name) for name in names] == [0.8, 50, 1.0]


def test_rows_beyond_the_tokenizer_are_never_drawn(capfd, tmp_path):
    """A vocabulary padded to 50,304, whose further rows are by far the likeliest."""
    network = checkpoint(tmp_path, vocab_size=50_304)
    with torch.no_grad():
        network.model.embed_tokens.weight[49_152:] *= 100
    save(tmp_path, network)
    code, texts, _ = run(capfd, f"--out_dir={tmp_path}", "--max_new_tokens=20", "--num_samples=3", "--top_k=0")
    assert code == 0 and len(texts) == 3


def test_a_checkpoint(capfd, tiny):
    flags = [f"--out_dir={tiny}", "--max_new_tokens=50"]  # beyond the context of 32: the window slides
    code, texts, output = run(capfd, *flags, "--num_samples=2")
    assert code == 0 and len(texts) == 2 and texts[0] != texts[1]  # decoded as one batch
    assert all(text.startswith("The") for text in texts)
    assert f"checkpoint: {tiny}/ckpt.pt, iteration 7, trained on text" in output
    assert run(capfd, *flags, "--num_samples=2")[1] == texts  # the same seed, the same texts
    assert run(capfd, *flags, "--num_samples=2", "--seed=2")[1] != texts
    assert run(capfd, f"--init_from={tiny}/ckpt.pt", "--max_new_tokens=50", "--num_samples=2")[1] == texts


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
