"""Test sample.py: its text with the official weights is that of transformers; chats, checkpoints, errors."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from configurator import configure

import jinja2
import pytest
import torch
from networks import llama, save, save_checkpoint, tiny

import sample
from lib.chat import SYSTEM
from lib.gguf import read_header
from lib.official import wheel_gguf
from lib.oracle import build_oracle
from lib.tokenizer import load_tokenizer
from model import SmolLM2
from sample import HELP, SampleConfig, converse

ROOT = Path(sample.__file__).parent


def run(capfd, *flags):
    """Run sample.py. Return (exit code or message, the samples that it printed, all of its output)."""
    code = 0
    try:
        sample.main(configure(SampleConfig, ["--device=cpu", "--dtype=float32", *flags]))
    except SystemExit as exit:
        code = exit.code
    output = capfd.readouterr().out
    return code, re.findall(r"^---\n(.*?)(?=\n---)", output, re.M | re.S), output


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    save_checkpoint(folder, tiny(max_position_embeddings=32))
    return folder


def continue_greedily(oracle, ids, count):
    """Return transformers' greedy continuation of a list of ids."""
    ids = torch.tensor([ids])
    settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=2)
    return oracle.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()


def test_official_weights_greedily_as_transformers(capfd, real_model, hf_tokenizer):
    prompt = "The capital of France is"
    oracle = build_oracle(real_model.config, real_model.state_dict())
    expected = continue_greedily(oracle, hf_tokenizer.encode(prompt).ids, 20)
    code, texts, output = run(capfd, "--init_from=base", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=20")
    assert code == 0 and texts == [prompt + hf_tokenizer.decode(expected)]
    assert "sha256" in output and "20 tokens in" in output


def talk(capfd, monkeypatch, lines, *flags):
    """Return the output of a conversation after each prompt."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code, _, output = run(capfd, "--chat", *flags)
    assert code == 0
    return [part.strip() for part in output[output.index(HELP) + len(HELP) :].split("\n> ")][1:]


def test_a_conversation(capfd, monkeypatch, real_model, hf_tokenizer):
    """Each answer is that of transformers to the full conversation so far, in the release's template."""
    template = jinja2.Template(read_header(wheel_gguf(), "tokenizer.chat_template"))
    oracle = build_oracle(real_model.config, real_model.state_dict())
    expected, messages = [], []
    lines = ["What is the capital of France?", "And of Italy?", "/system Answer in French.", "And of Spain?", "/foo"]
    for line in lines[:4]:
        if line.startswith("/"):
            messages.insert(0, dict(role="system", content="Answer in French."))
            continue
        messages.append(dict(role="user", content=line))
        text = template.render(messages=messages, add_generation_prompt=True)
        ids = continue_greedily(oracle, hf_tokenizer.encode(text).ids, 12)
        messages.append(dict(role="assistant", content=hf_tokenizer.decode(ids)))
        expected.append(messages[-1]["content"] + ("" if ids[-1] == 2 else " [cut at 12 tokens]"))
    parts = talk(capfd, monkeypatch, lines, "--init_from=base", "--temperature=0", "--max_new_tokens=12")
    assert parts[:2] + parts[3:4] == expected and "Paris" in expected[0]
    assert "Answer in French" in parts[2] and "/foo is not a command" in parts[4]


@pytest.mark.parametrize("rows, notes", [  # ids that the model writes, a column for each sample
    ([[504, 504], [2, 504]], ["The", "TheThe [cut at 2 tokens]"]), ([[2, 504], [2, 0]], ["[empty answer]", "The"]),
    ([[504], [2]], ["The"]), ([[504], [504]], ["TheThe [cut at 2 tokens]"]), ([[2]], ["[empty answer]"]),
])  # fmt: skip
def test_an_answer_that_is_cut_or_empty_gets_a_note(rows, notes, capfd, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, tiny(), chat=True)
    monkeypatch.setattr(SmolLM2, "generate", lambda self, idx, **_: map(torch.tensor, rows))
    flags = [f"--out_dir={tmp_path}", "--max_new_tokens=2"]
    texts = run(capfd, *flags, "--chat", "--prompt=Hi", f"--num_samples={len(notes)}")[2].split("---\nHi\n")[1:]
    assert [text.split("\n---")[0].strip() for text in texts] == notes
    if len(notes) == 1:
        assert talk(capfd, monkeypatch, ["Hi"], *flags) == [notes[0], ""]


def folder_with(path, template):
    save(path, llama(vocab_size=49_152, max_position_embeddings=128))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return f"--init_from={path}"


OTHER = "{% for message in messages %}{{ '<s>' + message['content'] }}{% endfor %}"


@pytest.mark.parametrize("template, note", [
    ("", "were not trained to chat"), (OTHER, "have a different chat template"),
    ([{"name": "default", "template": OTHER}], "have a different chat template"),
])  # fmt: skip
def test_weights_without_this_chat_template_get_a_note(template, note, capfd, tmp_path):
    flags = [folder_with(tmp_path, template), "--max_new_tokens=1"]
    output = run(capfd, *flags, "--chat", "--prompt=Hi")[2]
    assert output.count("note: these weights") == 1 and f"note: these weights {note}: SmolLM2's template is" in output
    assert "note: these weights" not in run(capfd, *flags)[2]


@pytest.mark.parametrize("newline", ["\n", "\\n"])
@pytest.mark.parametrize("sentence", ["You are a helpful assistant.", "Antworte knapp (auf Deutsch)!"])
def test_a_template_with_a_different_system_message(newline, sentence, capfd, monkeypatch, tmp_path, hf_tokenizer):
    """Some copies of the release have one: the prompt is as jinja2 renders their template, and there is no note."""
    template = read_header(wheel_gguf(), "tokenizer.chat_template").replace("\n", newline).replace(SYSTEM, sentence)
    prompts = []

    def generate(self, idx, **_):
        prompts.extend(idx.tolist())
        yield torch.tensor([2])

    monkeypatch.setattr(SmolLM2, "generate", generate)
    flags = [folder_with(tmp_path, template), "--chat"]
    assert "note: these weights" not in run(capfd, *flags, "--prompt=Hi")[2]
    talk(capfd, monkeypatch, ["/system Be kind.", "/system", "Hi"], *flags)
    messages = [dict(role="user", content="Hi")]
    text = jinja2.Template(template, keep_trailing_newline=True).render(messages=messages, add_generation_prompt=True)
    assert prompts == [hf_tokenizer.encode(text).ids] * 2


PASTED = """
import sample
sample.question_ids = lambda encoding, system, turns: turns[-1]["content"]
sample.converse(None, "", 100, lambda ids: iter([[repr(ids)], [None]]))
"""


def test_lines_pasted_together_are_one_question():
    """In a terminal. Lines that are typed, even ahead of time, are one question each."""
    terminal, theirs = os.openpty()
    env = dict(os.environ, TERM="xterm")
    process = subprocess.Popen([sys.executable, "-c", PASTED], cwd=ROOT, env=env, stdin=theirs, stdout=theirs)
    os.close(theirs)
    output = b""
    for expected, keys in ((b"> ", b"\x1b[200~one\ntwo\rthree\x1b[201~\r"), (b"three'", b"four\rfive\r/exit\r")):
        while expected not in output:
            output += os.read(terminal, 1_000)
        os.write(terminal, keys)
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
        while chunk := os.read(terminal, 1_000):
            output += chunk
    assert process.wait() == 0
    os.close(terminal)
    for answer in (rb"'one\ntwo\nthree'", b"'four'", b"'five'"):
        assert answer in output, output


def test_a_conversation_longer_than_the_context(capfd, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, tiny())
    lines = ["one two three " * 4, "four five six " * 4, "seven " * 200, "/reset", "hello"]
    parts = talk(capfd, monkeypatch, lines, f"--out_dir={tmp_path}", "--max_new_tokens=40")
    assert "1 of 1 earlier turns are forgotten" in parts[1] and "too long: " in parts[2]
    assert "a new conversation" in parts[3] and "forgotten" not in parts[4]


def test_ctrl_c_ends_the_reply_and_not_the_program(capfd, monkeypatch):
    def write(ids):
        yield ["half"]
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    converse(load_tokenizer(), "Be kind.", 100, write)
    assert "half (stopped)\n\n> " in capfd.readouterr().out


def test_the_prompt_of_a_file_and_of_standard_input(capfd, monkeypatch, out_dir, tmp_path):
    (tmp_path / "a.txt").write_text("Grüße,\nWelt\n", encoding="utf-8-sig")
    flags = [f"--out_dir={out_dir}", "--max_new_tokens=3"]
    texts = run(capfd, *flags, f"--prompt=@{tmp_path}/a.txt")[1]
    assert texts[0].startswith("Grüße,\nWelt")
    with open(tmp_path / "a.txt") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert run(capfd, *flags, "--prompt=-")[1] == texts


@pytest.mark.parametrize("flag", [
    "--temperature=-0.1", "--temperature=nan", "--top_p=1.5", "--top_k=-2", "--repetition_penalty=0", "--num_samples=0",
    "--seed=18446744073709551616",
])  # fmt: skip
def test_sampling_settings_are_checked_before_the_weights_load(flag, capfd):
    with pytest.raises(SystemExit) as exit:
        configure(SampleConfig, ["--out_dir=nowhere", flag])
    assert exit.value.code == 2 and "it must be a" in capfd.readouterr().err


@pytest.mark.parametrize("flags, values", [
    (["--chat"], [0.2, 0, 0.9]), (["--chat", "--top_k=5"], [0.2, 5, 0.9]), ([], [0.8, 50, 1.0]),
])  # fmt: skip
def test_chat_has_the_cards_defaults(flags, values):
    config = configure(SampleConfig, flags)
    assert [config.temperature, config.top_k, config.top_p] == values


def test_rows_beyond_the_tokenizer_are_never_drawn(capfd, tmp_path):
    """A vocabulary padded to 50,304, in which the padding rows are by far the most likely."""
    model = tiny(vocab_size=50_304)
    model.model.embed_tokens.weight.data[49_152:] *= 100
    save_checkpoint(tmp_path, model)
    code, texts, _ = run(capfd, f"--out_dir={tmp_path}", "--max_new_tokens=20", "--num_samples=3", "--top_k=0")
    assert code == 0 and len(texts) == 3


def test_a_checkpoint(capfd, out_dir):
    flags = [f"--out_dir={out_dir}", "--max_new_tokens=50", "--num_samples=2"]  # the context is 32: the window slides
    code, texts, output = run(capfd, *flags)
    assert code == 0 and len(texts) == 2 and texts[0] != texts[1]  # decoded as one batch
    assert all(text.startswith("The") for text in texts)
    assert f"checkpoint: {out_dir}/ckpt.pt, iteration 7, trained on text" in output
    assert run(capfd, *flags)[1] == texts  # the same seed, the same texts
    assert run(capfd, *flags, "--seed=2")[1] != texts
    assert run(capfd, f"--init_from={out_dir}/ckpt.pt", *flags[1:])[1] == texts
    greedy = [run(capfd, *flags, f"--temperature={t}")[1] for t in (0, 1e-40, 1e-37)]  # logits / 1e-37 overflow
    assert greedy[0] == greedy[1] == greedy[2]
    assert run(capfd, *flags[:2], "--prompt=")[1][0]  # an empty prompt begins a document


@pytest.mark.parametrize("flags, message", [
    (["--out_dir=nowhere"], "there is no checkpoint nowhere/ckpt.pt"),
    (["--prompt=" + 40 * "one "], r"the prompt has \d+ tokens, but the context only 32: shorten the prompt"),
    (["--prompt=@no.txt"], r"no.txt cannot be used \(No such file"),
    (["--prompt=@latin.txt"], r"latin.txt cannot be used \('utf-8' codec can't decode .*: .* in UTF-8"),
    (["--device=cuda:9"], "device cuda:9 cannot be used"),
])  # fmt: skip
def test_errors(capfd, out_dir, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"\xff\xfe")
    code, _, _ = run(capfd, f"--out_dir={out_dir}", *flags)
    assert re.match("error: ", code) and re.search(message, code) and "\n" not in code


def test_without_a_compiler_it_runs_eagerly(out_dir, capfd, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    flags = [f"--out_dir={out_dir}", "--prompt=The", "--max_new_tokens=5"]
    eager = run(capfd, *flags)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    code, texts, output = run(capfd, "--compile", *flags)
    assert code == 0 and texts == eager[1]
    assert "compile     torch.compile failed (RuntimeError: no C++ compiler), running eagerly" in output


@pytest.mark.parametrize("to", ["| head -1", ">&-"])
def test_a_closed_stdout_is_no_error(to, out_dir):
    flags = f"--out_dir={out_dir} --device=cpu --dtype=float32 --num_samples=9 --max_new_tokens=9"
    line = f"{sys.executable} sample.py {flags} {to}"
    process = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("error, kind, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), SystemExit, r"error: out of memory \(CUDA .*bfloat16"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), SystemExit, r"error: out of memory \(.*bfloat16"),
    (MemoryError(), SystemExit, r"error: out of memory \(MemoryError\).*--dtype=bfloat16"),
    (OSError(5, "Input/output error", "a.json.12.tmp"), SystemExit, "error: a.json: Input/output error: use a diff"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError, "illegal memory access"),
])  # fmt: skip
def test_out_of_memory_and_other_errors(out_dir, error, kind, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(SmolLM2, "hidden", fail)
    with pytest.raises(kind, match=message):
        sample.main(SampleConfig(out_dir=str(out_dir), dtype="float32", device="cpu"))
