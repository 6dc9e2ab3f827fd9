"""train.py: the loop held against a plain one of transformers and torch, the data order, and the exact resume."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from configurator import configure

import numpy as np
import pytest
import torch
from exact_train import flatten, list_differing, pick_matmul
from networks import write_dataset

import resume_test
import train
from lib.batches import get_blocks, mix
from lib.checkpoint import write_checkpoint
from lib.optimizer import get_lr
from lib.tokenizer import load_tokenizer
from resume_test import ResumeTestConfig
from train import TrainConfig, saved_settings

ROOT = Path(__file__).parent.parent
TINY = [
    "--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2", "--num_attention_heads=2",
    "--num_key_value_heads=1", "--head_dim=16", "--max_position_embeddings=64", "--batch_size=4", "--block_size=16",
    "--learning_rate=0.01", "--warmup_iters=3", "--lr_decay_iters=12", "--max_iters=12", "--log_interval=1",
    "--eval_interval=4", "--eval_iters=2", "--sample_interval=0", "--dtype=float32", "--device=cpu",
    "--vocab_size=256",
]  # fmt: skip
RESUME = ["--init_from=resume", "--max_iters=12"]
SAMPLES = "--vocab_size=49152"  # what the tokenizer needs
load_tokenizer_once = functools.cache(load_tokenizer)  # it takes 3 s
TEXT = list("\n".join(pydoc_data.topics.topics.values()).encode()[:4000])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, with the bytes of a text: data/text, 3,000 and 500 to evaluate on, and data/short, 210."""
    for name, train_ids in (("text", TEXT[:3000]), ("short", TEXT[:210])):
        write_dataset(tmp_path / "data" / name, train_ids, TEXT[3000:3500], vocab_size=256)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lib.processes.pick_matmul", pick_matmul)
    monkeypatch.setattr("lib.evaluation.load_tokenizer", load_tokenizer_once)
    # a picture takes longer than the iterations between two of them
    monkeypatch.setattr("lib.log.plot_log", lambda log_path, path, *_: path.write_bytes(b"picture"))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*flags):
    """train.py in this process; returns its exit code, or its error message."""
    argv = list(flags) if "--init_from=resume" in flags else [*TINY, "--dataset=text", *flags]
    errors = io.StringIO()
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stderr(errors):
        train.main(configure(TrainConfig, argv, saved=saved_settings))
    return errors.getvalue().strip() if exit.value.code == 2 else exit.value.code


def command(*flags):
    """Return the command line of a new run of train.py in a separate process."""
    return [sys.executable, str(ROOT / "tests/exact_train.py"), *TINY, "--dataset=text", *flags]


def load(folder):
    return torch.load(f"{folder}/ckpt.pt", weights_only=True)


def rows(folder):
    """log.csv without its timings."""
    with open(f"{folder}/log.csv", newline="") as file:
        return [row[:5] for row in csv.reader(file)]


def assert_same(a, b, ignore=()):
    assert set(list_differing(load(a), load(b))) <= {"/config/out_dir", *ignore}
    assert rows(a) == rows(b)


# ---- N straight = k + resume to N


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gradient_accumulation_steps=2"],
        ["--dtype=bfloat16"],
        ["--dataset=short"],  # three iterations an epoch
        ["--schedule=wsd", "--wsd_decay_iters=5", "--log_interval=5", "--sample_interval=5", SAMPLES],
    ],
    ids=["plain", "accumulation", "bfloat16", "epoch", "wsd"],
)
def test_straight_equals_resumed(place, flags):
    assert run("--out_dir=a", *flags) == 0
    assert run("--out_dir=b", "--max_iters=5", *flags) == 0
    assert list_differing(load("a")["model"], load("b")["model"])  # the comparison sees
    assert run("--out_dir=b", *RESUME) == 0
    assert_same("a", "b")
    assert [row[0] for row in rows("a")[1:] if row[4]] == ["0", "4", "8", "12"]


def test_a_signal_finishes_the_iteration_and_saves(place):
    """torture.py tries the other signals, and deaths."""
    assert run("--out_dir=a") == 0  # to 12 and on to where the other ends
    process = subprocess.Popen(
        command("--out_dir=b", "--max_iters=1000000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("iter      5 | loss"):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # a scheduler may send it twice
            break
    output, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == ""
    reached = load("b")["iter_num"]
    assert f"stopped by SIGTERM: iteration {reached} is in b/ckpt.pt" in output
    for folder in ("a", "b"):
        assert run(f"--out_dir={folder}", "--init_from=resume", f"--max_iters={reached + 9}") == 0
    assert list_differing(load("a"), load("b")) == ["/config/out_dir"]


def test_a_signal_before_the_first_iteration_gets_one_line(place):
    """While it loads or compiles, there is nothing to save."""
    script = "import train, signal, os\nload = train.open_data\n"
    script += "train.open_data = lambda *a: (os.kill(os.getpid(), signal.SIGINT), load(*a))[1]\n"
    script += "train.main(train.configure(train.TrainConfig))"
    argv = [*TINY, "--dataset=text", "--out_dir=a"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, env=env)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "stopped by SIGINT before the first iteration: nothing was trained or saved\n"
    assert not Path("a").exists()


def test_a_closed_stdout_loses_nothing(place):
    """python train.py | head -1"""
    assert run("--out_dir=a") == 0
    line = " ".join(command("--out_dir=b")) + " | head -1"
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True)
    assert process.returncode == 0 and len(process.stdout.splitlines()) == 1
    assert process.stderr == "note: no more output, stdout is gone (Broken pipe); the run continues\n"
    assert_same("a", "b")
    assert Path("b/loss.png").stat().st_size > 5_000


def test_other_threads_are_noted(place, capfd):
    assert run("--out_dir=a", "--max_iters=2") == 0
    checkpoint = load("a")
    machine = dict(threads=torch.get_num_threads(), processes=1, float32_matmul_precision="highest")
    assert checkpoint["machine"] == machine
    write_checkpoint("a/ckpt.pt", checkpoint | {"machine": machine | dict(threads=99)})
    assert run("--out_dir=a", "--init_from=resume", "--max_iters=3") == 0
    note = f"note: {torch.get_num_threads()} threads, 99 before: the run continues, but its bits may differ"
    assert note in capfd.readouterr().out


def test_prompts_of_any_length(place):
    assert run("--out_dir=a", "--max_iters=1", "--sample_interval=1", "--sample_prompt=", SAMPLES) == 0
    message = run("--out_dir=b", "--sample_interval=1", "--sample_prompt=" + 99 * "word ", SAMPLES)
    assert "sample_prompt is longer than the context (64): shorten it" in message


def test_looking_does_not_disturb(place):
    """Other evaluations and samples: the same losses and the same weights to the bit."""
    assert run("--out_dir=a", SAMPLES) == 0
    assert run("--out_dir=b", "--eval_interval=3", "--eval_iters=5", "--sample_interval=2", SAMPLES) == 0
    a, b = load("a"), load("b")
    assert list_differing(a["model"], b["model"]) == list_differing(a["optimizer"], b["optimizer"]) == []
    assert [row for row in rows("a") if row[1]] == [row for row in rows("b") if row[1]]


def test_torchrun(place):
    """Two processes: straight equals resumed to the bit, and one process to 1e-5."""
    assert run("--out_dir=one") == 0
    two = [*TINY, "--dataset=text"]
    several(place, [*two, "--out_dir=a"], [*two, "--out_dir=b", "--max_iters=5"], ["--out_dir=b", *RESUME])
    assert_same("a", "b")
    one, two = load("one")["model"], load("a")["model"]
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    for left, right in zip(rows("one")[1:], rows("a")[1:], strict=True):
        assert [float(x or 0) for x in left] == pytest.approx([float(x or 0) for x in right], abs=1e-4)


def test_the_mean_is_over_the_tokens_that_carry_a_loss(place):
    """However the batch is cut: whole, in micro-batches, among processes. The mask is uneven, one row has no loss."""
    ids = TEXT[: 24 * 17]
    rows_of_ones = [[0] * 17, [0] + [1] * 16] + [[0] * n + [1] * (17 - n) for n in range(14, 4, -1)]
    write_dataset(place / "data/chat", ids, ids[:34], sum(rows_of_ones, []), vocab_size=256, block_size=16)
    flags = [*TINY, "--dataset=chat", "--max_iters=3", "--learning_rate=1e-3", "--warmup_iters=0", "--grad_clip=0"]
    run(*flags, "--out_dir=a", "--batch_size=8")
    run(*flags, "--out_dir=b", "--batch_size=2", "--gradient_accumulation_steps=4")
    several(place, [*flags, "--out_dir=c", "--batch_size=4", "--gradient_accumulation_steps=2"])
    for other in ("b", "c"):
        for a, b in zip(rows("a")[1:], rows(other)[1:], strict=True):
            assert [float(v or 0) for v in a] == pytest.approx([float(v or 0) for v in b], rel=1e-5)
        for name, p in load("a")["model"].items():
            torch.testing.assert_close(load(other)["model"][name], p, atol=1e-5, rtol=0)

    x, y = get_blocks(np.array(ids), 0, 8, 16, mix(1337, 0), np.array(sum(rows_of_ones, []) * 2))
    initial = train.build_model(TrainConfig(**load("a")["config"]), "cpu")
    expected = torch.nn.functional.cross_entropy(initial(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    assert float(rows("a")[2][1]) == pytest.approx(expected.item(), rel=1e-5)


def test_one_of_two_processes_is_killed(place):
    """The other ends with one line."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = place / "killed.py"
    script.write_text(KILLED_IN_ITERATION)
    argv = [sys.executable, *launcher, str(script), str(ROOT), *TINY, "--dataset=text", "--out_dir=b"]
    process = subprocess.run(argv, capture_output=True, text=True)
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"another process of this run ended \(.*\): .* --init_from=resume --out_dir=b$", line)
    ours = process.stderr[: process.stderr.index("torch/distributed/run.py")]  # the rest is torchrun's own report
    assert "train.py" not in ours
    assert load("b")["iter_num"] == 4


def test_sharded(place):
    """
    Two processes that keep half of everything: the losses of two that keep copies; straight equals resumed to the bit;
    a checkpoint goes to one process and back; by Muon, and with the rest of what needs all processes, too.
    """
    passes = ["--batch_size=2", "--gradient_accumulation_steps=4"]  # two in each process
    two = [*TINY, "--dataset=text", *passes, "--eval_interval=6", "--eval_iters=3", "--shard=True"]
    rest = ["--save_best=True", "--activation_checkpointing=True"]
    muon = ["--optimizer=muon", "--max_iters=4", SAMPLES]
    several(
        place,
        [*two, "--out_dir=copies", "--shard=False"],
        [*two, "--out_dir=a"],
        [*two, "--out_dir=b", "--max_iters=5", *rest],
        [*two, "--out_dir=m", *muon],
        [*two, "--out_dir=n", *muon, "--max_iters=2", "--sample_interval=2"],
    )
    shutil.copytree("b", "c")
    assert run("--out_dir=c", "--init_from=resume", "--max_iters=8") == 0  # one process
    several(
        place,
        ["--out_dir=b", *RESUME],
        ["--out_dir=c", *RESUME],
        ["--out_dir=n", "--init_from=resume", "--max_iters=4"],
    )
    assert_same("a", "b", ignore=["/config/save_best", "/config/activation_checkpointing"])
    assert_same("m", "n", ignore=["/config/sample_interval"])
    assert flatten(load("a")).keys() == flatten(load("copies")).keys()
    for other in ("copies", "c"):
        for row, expected in zip(rows("a")[1:], rows(other)[1:], strict=True):
            losses = ([float(x or 0) for x in (r[1], r[4])] for r in (row, expected))
            assert next(losses) == pytest.approx(next(losses), rel=1e-6)
    best, ours = torch.load("b/best.pt", weights_only=True), load("a")["model"]
    assert {name: t.shape for name, t in best["model"].items()} == {name: t.shape for name, t in ours.items()}


def several(place, *argvs):
    """Runs of train.py one after another in the same two processes, which spares the start of Python and torch."""
    (place / "several.py").write_text(SEVERAL)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [sys.executable, *launcher, str(place / "several.py"), str(ROOT), json.dumps(argvs)]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


SEVERAL = """
import json, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import exact_train
import torch.distributed as dist
import train
import lib.processes
lib.processes.pick_matmul = exact_train.pick_matmul
init = dist.init_process_group
for number, argv in enumerate(json.loads(sys.argv[2])):
    meeting = f"file://{os.getcwd()}/{os.environ['TORCHELASTIC_RUN_ID']}.{number}"
    ranks = dict(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    dist.init_process_group = lambda backend, timeout: init(backend, init_method=meeting, timeout=timeout, **ranks)
    try:
        train.main(train.configure(train.TrainConfig, argv, saved=train.saved_settings))
    except SystemExit as stop:
        if stop.code != 0:
            raise
"""


KILLED_IN_ITERATION = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import lib.batches
import train
get_blocks = lib.batches.get_blocks
def dying(data, first, *rest):
    if os.environ["RANK"] == "1" and first >= 4 * 6 and len(data) > 1000:
        os.kill(os.getpid(), signal.SIGKILL)
    return get_blocks(data, first, *rest)
lib.batches.get_blocks = dying
train.main(train.configure(train.TrainConfig, saved=train.saved_settings))
"""


def test_compiled_and_eager_share_checkpoints(place, capfd):
    assert run("--out_dir=eager", "--max_iters=6") == 0
    keys = flatten(load("eager")).keys()
    assert run("--out_dir=b", "--max_iters=2", "--compile=True") == 0
    assert "; compiled\n" in capfd.readouterr().out
    assert flatten(load("b")).keys() == keys
    assert run("--out_dir=b", "--init_from=resume", "--max_iters=4", "--compile=False") == 0
    assert run("--out_dir=b", "--init_from=resume", "--max_iters=6", "--compile=True") == 0
    assert flatten(load("b")).keys() == keys
    eager, mixed = load("eager")["model"], load("b")["model"]
    assert max((eager[name] - mixed[name]).abs().max().item() for name in eager) < 1e-3


def test_without_a_compiler_it_goes_on(place, capfd, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    assert run("--out_dir=a", "--max_iters=2", "--compile=True") == 0
    assert "compile     torch.compile failed (RuntimeError: no C++ compiler), running eagerly" in capfd.readouterr().out
    assert load("a")["config"]["compile"] is False


def test_how_fp32_is_multiplied_is_measured_once(place, capfd, monkeypatch):
    monkeypatch.setattr("lib.processes.pick_matmul", lambda *_: ("float32", "medium"))
    assert run("--out_dir=a", "--max_iters=2", "--dtype=auto") == 0
    monkeypatch.setattr("lib.processes.pick_matmul", lambda *_: pytest.fail("measured again"))
    torch.set_float32_matmul_precision("highest")
    assert run("--out_dir=a", "--init_from=resume", "--max_iters=3") == 0
    assert load("a")["machine"]["float32_matmul_precision"] == torch.get_float32_matmul_precision() == "medium"
    assert capfd.readouterr().out.count("fp32 matmuls (medium)") == 2


# ---- resume_test.py


def checkpoint_test(capfd):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        resume_test.main(ResumeTestConfig(out_dir="a", iters=5))
    return exit.value.code, capfd.readouterr().out


def test_the_checkpoint_test(place, capfd):
    assert run("--out_dir=a", "--max_iters=4") == 0
    before = Path("a/ckpt.pt").read_bytes()
    code, out = checkpoint_test(capfd)
    assert code == 0 and out.count("✓") == 7 and "\n✗" not in out
    assert re.search(r"resume_test: 6 ✓, 0 ✗: after the resume, 0 of [\d,]+ weights differ\n$", out), out
    assert "a/ckpt.pt: iteration 4; straight to 14, and with a stop at 9" in out
    assert Path("a/ckpt.pt").read_bytes() == before and {path.name for path in Path("a").iterdir()} == {
        "ckpt.pt", "log.csv", "loss.png", "resume.png",
    }  # fmt: skip


def load_without_moments(optimizer, state_dict, load=torch.optim.AdamW.load_state_dict):
    load(optimizer, state_dict)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def load_nothing(self, state_dict):
    pass


BROKEN_RESUMES = {
    "moments": (torch.optim.AdamW, load_without_moments, ["moments at 14"]),
    "weights": (train.SmolLM2, load_nothing, ["log.csv", "weights at 14"]),
    "scheduler": (torch.optim.lr_scheduler.LambdaLR, load_nothing, ["log.csv", "weights at 14"]),
}


@pytest.mark.parametrize("what", BROKEN_RESUMES)
def test_the_checkpoint_test_can_fail(what, place, capfd, monkeypatch):
    assert run("--out_dir=a", "--max_iters=4") == 0
    cls, load_state_dict, rows = BROKEN_RESUMES[what]
    monkeypatch.setattr(cls, "load_state_dict", load_state_dict)
    code, out = checkpoint_test(capfd)
    assert code == 1
    for row in rows:
        assert re.search(rf"^✗ .*{row}", out, re.M), (row, out)


# ---- What a resume says and keeps


def test_a_resume_proves_itself(place, capfd):
    """The evaluation of the checkpoint is repeated, to the bit; other batches give another loss."""
    assert run("--out_dir=a", "--max_iters=4") == 0
    val_loss = f"{float(rows('a')[-1][4]):.4f}"
    assert run("--out_dir=a", "--init_from=resume", "--max_iters=5") == 0
    line = f"resume      val loss at 4: {val_loss} before the stop, {val_loss} now: identical\n"
    assert line in capfd.readouterr().out
    assert run("--out_dir=a", "--init_from=resume", "--max_iters=6", "--eval_interval=5", "--eval_iters=3") == 0
    assert re.search("resume      val loss at 5: .* now: they differ by", capfd.readouterr().out)


def test_the_logged_loss_is_the_mean_since_the_last_line(place):
    """Also if a stop comes between two lines."""
    assert run("--out_dir=a") == 0
    assert run("--out_dir=b", "--log_interval=3", "--max_iters=5") == 0
    assert run("--out_dir=b", *RESUME) == 0
    one, three = ([float(row[1]) for row in rows(folder)[1:] if row[1]] for folder in ("a", "b"))
    assert three == pytest.approx(np.reshape(one, (4, 3)).mean(1), rel=1e-12)


def test_a_new_batch_size_skips_and_repeats_nothing(place, capfd, monkeypatch):
    spans = []

    def record(data, first, count, *rest):
        if len(data) > 1000:  # train.bin
            spans.append((first, first + count))
        return get_blocks(data, first, count, *rest)

    monkeypatch.setattr("lib.batches.get_blocks", record)
    assert run("--out_dir=a", "--max_iters=3") == 0
    assert run("--out_dir=a", "--init_from=resume", "--max_iters=5", "--batch_size=2") == 0
    # each run prefetches one batch that it does not train on
    assert spans == [(0, 4), (4, 8), (8, 12), (12, 16), (12, 14), (14, 16), (16, 18)]
    assert load("a")["sequences_read"] == 16
    output = capfd.readouterr().out
    assert "note: an iteration reads 2 sequences, 4 before: no sequence is skipped or repeated" in output
    assert f"5 iterations = {16 * 16 / 3000:.2f} epochs" in output


def test_resume_restores_settings_and_prints_what_changed(place, capfd):
    assert run("--out_dir=a", "--max_iters=3", "--weight_decay=0.2") == 0
    capfd.readouterr()
    flags = ["--out_dir=a", "--init_from=resume", "--max_iters=5", "--learning_rate=0.02", "--eval_iters=1"]
    flags += ["--rope_theta=500000"]  # fits any tensors
    flags += ["--min_lr=0.002"]  # above learning_rate's default: only the saved one counts
    assert run(*flags) == 0
    output = capfd.readouterr().out
    assert "resuming at iteration 4, from a/ckpt.pt" in output
    changed = re.findall(r"^    (\w+: .*)$", output, re.M)
    settings = ["eval_iters: 2 -> 1", "learning_rate: 0.01 -> 0.02", "max_iters: 3 -> 5", "min_lr: None -> 0.002"]
    assert sorted(changed) == [*settings, "rope_theta: 100000.0 -> 500000.0"]
    after = load("a")
    config = TrainConfig(**after["config"])
    assert (after["iter_num"], config.weight_decay, config.rope_theta) == (5, 0.2, 5e5)
    assert [float(row[2]) for row in rows("a")[1:] if row[1]][3:] == [get_lr(config, 3), get_lr(config, 4)]


def test_a_resume_at_the_end_repeats_the_last_evaluation(place, capfd):
    """Death between the last save and the end of its evaluation must not leave a hole in log.csv."""
    assert run("--out_dir=a") == 0
    capfd.readouterr()
    before = load("a"), rows("a")
    log = Path("a/log.csv").read_text()
    Path("a/log.csv").write_text("".join(log.splitlines(keepends=True)[:-1]))  # without it
    assert run("--out_dir=a", *RESUME) == 0
    output = capfd.readouterr().out
    assert "a/ckpt.pt is at iteration 12 already: nothing to train" in output and "checkpoint  " not in output
    assert (list_differing(load("a"), before[0]), rows("a")) == ([], before[1])


def test_a_second_run_does_not_lose_the_first(place, capfd):
    """And the commands that are printed can be pasted."""
    assert run("--out_dir=my run", "--max_iters=2") == 0
    before = {path: path.read_bytes() for path in Path("my run").iterdir()}
    message = run("--out_dir=my run", "--max_iters=1")
    assert "my run/ckpt.pt holds an earlier run: to continue it, --init_from=resume --out_dir='my run';" in message
    assert {path: path.read_bytes() for path in Path("my run").iterdir()} == before
    assert run("--out_dir=my run", "--init_from=resume") == 0
    assert "python train.py --init_from=resume --out_dir='my run' --max_iters=52" in capfd.readouterr().out
    assert run("--out_dir=my run", "--max_iters=1", "--overwrite=True") == 0
    assert load("my run")["iter_num"] == 1


@pytest.mark.parametrize("flags, message", [
    (["--learning_rate=1e-5", "--min_lr=3e-5"], "min_lr is 3e-05: it must be between 0 and learning_rate (1e-05)"),
    (["--learning_rate=-1e-3"], "learning_rate is -0.001: it must be a number from 0 to 100"),
    (["--learning_rate=nan"], "learning_rate is nan"),
    (["--grad_clip=-1"], "grad_clip is -1.0"),
    (["--weight_decay=-1"], "weight_decay is -1.0"),
    (["--warmup_iters=-5"], "warmup_iters is -5: it must be a whole number from 0"),
    (["--beta1=1.0"], "beta1 is 1.0"),
    (["--max_iters=0"], "max_iters is 0: it must be a whole number from 1"),
    (["--hidden_size=0"], "hidden_size is 0"),
    (["--head_dim=0"], "head_dim is 0"),
    (["--num_key_value_heads=0"], "num_key_value_heads is 0"),
    (["--initializer_range=-1"], "initializer_range is -1.0"),
    (["--rope_theta=nan"], "rope_theta is nan"),
    (["--num_hidden_layers=1000000000"], "num_hidden_layers is 1000000000"),
    (["--seed=-1"], "seed is -1"),
    (["--muon_learning_rate=0.1"], "muon_learning_rate has no effect without --optimizer=muon"),
    (["--optimizer=muon", "--muon_learning_rate=-1"], "muon_learning_rate is -1.0: it must be a number from 0 to 100"),
    (["--optimizer=muon", "--muon_learning_rate=1", "--learning_rate=0"], "needs a learning_rate above 0"),
    (["--block_size=65"], "block_size 65 is longer than the context"),
    (["--log_interval=0"], "log_interval is 0: it must be a whole number from 1"),
    (["--num_attention_heads=3", "--num_key_value_heads=2"], "must be a multiple"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(place, flags, message):
    """Once where they enter, by name."""
    assert message in run("--out_dir=a", *flags)
    assert not Path("a").exists()


def test_weights_bring_their_networks_settings_and_flags_hold(place, capfd):
    assert run("--out_dir=a", "--max_iters=2") == 0
    flags = ["--init_from=a/ckpt.pt", "--dataset=text", "--max_iters=1", "--block_size=16", "--eval_iters=1"]
    flags += ["--sample_interval=0", "--device=cpu"]

    def start(*more):
        with pytest.raises(SystemExit) as exit:
            train.main(configure(TrainConfig, [*flags, *more], saved=saved_settings))
        return exit.value.code

    assert start("--out_dir=b") == 0
    assert load("b")["config"]["hidden_size"] == 32 and load("b")["config"]["max_position_embeddings"] == 64
    held = ["--rope_theta=500000", "--rms_norm_eps=0.01", "--max_position_embeddings=99"]
    capfd.readouterr()
    assert start("--out_dir=c", *held) == 0
    changed = re.findall(r"^    (\w+: .*)$", capfd.readouterr().out, re.M)
    assert changed == [
        "max_position_embeddings: 64 -> 99",
        "rope_theta: 100000.0 -> 500000.0",
        "rms_norm_eps: 1e-05 -> 0.01",
    ]
    config = load("c")["config"]
    assert (config["rope_theta"], config["rms_norm_eps"], config["max_position_embeddings"]) == (5e5, 0.01, 99)
    assert rows("c")[1] != rows("b")[1]  # another network
    message = start("--out_dir=d", "--num_hidden_layers=12")
    assert "num_hidden_layers is set to 12, but the model in a/ckpt.pt has 2" in message
    assert not Path("d").exists()


def test_the_best_weights_are_kept_where_asked(place):
    assert run("--out_dir=a") == 0 and not Path("a/best.pt").exists()
    assert run("--out_dir=b", "--save_best=True", "--eval_interval=1", "--max_iters=6") == 0
    assert run("--out_dir=b", *RESUME, "--learning_rate=9", "--lr_decay_iters=99") == 0  # from here on it gets worse
    val = {int(row[0]): float(row[4]) for row in rows("b")[1:] if row[4]}
    best = torch.load("b/best.pt", weights_only=True)
    assert best["iter_num"] == min(val, key=val.get) <= 6 < max(val) and best["best_val_loss"] == min(val.values())
    assert "optimizer" not in best and best["config"]["hidden_size"] == 32
    assert run("--out_dir=c", "--init_from=b/best.pt", "--max_iters=1") == 0
    assert float(rows("c")[1][4]) == min(val.values())


# ---- The loop against one of transformers and torch


def test_against_a_plain_loop(place):
    """Twelve updates of transformers' Llama by torch's own AdamW, clipping and schedule: the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    flags = ["--warmup_iters=0", "--min_lr=0", "--lr_decay_iters=12"]
    assert run("--out_dir=a", "--init_from=scratch", *flags, "--max_iters=12") == 0
    ours = load("a")
    config = TrainConfig(**ours["config"])
    torch.manual_seed(config.seed)
    start = train.SmolLM2(train.ModelConfig(**{f.name: getattr(config, f.name) for f in shape_fields()}))
    peer = LlamaForCausalLM(
        LlamaConfig(
            **{f.name: getattr(config, f.name) for f in shape_fields() if f.name != "rope_theta"},
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True, attn_implementation="eager",
        )
    )  # fmt: skip
    peer.load_state_dict(start.state_dict(), strict=False)
    decayed = [p for p in peer.parameters() if p.dim() > 1]
    others = [p for p in peer.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, 12)
    data = np.fromfile("data/text/train.bin", dtype="<u2")
    for iter_num in range(12):
        x, y = get_blocks(data, 4 * iter_num, 4, 16, mix(config.seed, 0))
        loss = torch.nn.functional.cross_entropy(peer(x).logits.flatten(0, 1), y.flatten())
        assert loss.item() == pytest.approx(float(rows("a")[1:][iter_num + 1 + iter_num // 4][1]), abs=2e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    theirs = peer.state_dict()
    for name, weight in ours["model"].items():
        moved = (theirs[name] - start.state_dict()[name]).norm()
        assert (weight - theirs[name]).norm() < 2e-3 * moved, name


def shape_fields():
    return dataclasses.fields(train.ModelConfig)


@pytest.mark.parametrize("flags, end", [
    (["--warmup_iters=20", "--lr_decay_iters=99"], "takes 20 iterations, the run ends at 2"),
    (["--warmup_iters=1", "--schedule=wsd", "--wsd_decay_iters=12"], "takes 1 iterations, the decay begins at 0"),
    (["--warmup_iters=1"], None),
])  # fmt: skip
def test_a_peak_that_is_never_reached_is_noted(place, capfd, flags, end):
    """And a single batch has no standard error."""
    assert run("--out_dir=a", "--max_iters=2", "--eval_iters=1", *flags) == 0
    output = capfd.readouterr().out
    assert f"the peak learning rate is never reached: warmup {end}" in output if end else "note" not in output
    assert "nan" not in output and "nan" not in Path("a/log.csv").read_text()


def test_learning_rate():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    assert [get_lr(config, i) for i in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert get_lr(config, 60) == pytest.approx(0.55)
    assert get_lr(config, 110) == get_lr(config, 100_000) == pytest.approx(0.1)
    longer = dataclasses.replace(config, max_iters=9_999)
    assert all(get_lr(config, i) == get_lr(longer, i) for i in range(200))
    wsd = dataclasses.replace(config, schedule="wsd", min_lr=0.0, wsd_decay_iters=20)
    assert [get_lr(wsd, i) for i in (10, 50, 90, 100, 110, 200)] == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert get_lr(dataclasses.replace(config, min_lr=None), 110) == pytest.approx(0.1)


# ---- What bad input gets: one line, no traceback, nothing on the disk changed


def poisoned_checkpoint():
    checkpoint = load("a")
    checkpoint["model"]["model.norm.weight"][0] = math.inf
    write_checkpoint("a/ckpt.pt", checkpoint)


ERRORS = {
    "missing dataset": (["--dataset=nowhere"], None, r"nowhere/meta.json does not exist: run python prepare"),
    "short text": (["--block_size=500", "--max_position_embeddings=500"], None, r"val holds 500 tokens, fewer"),
    "missing checkpoint": (["--init_from=resume", "--out_dir=b"], None, r"there is no checkpoint b/ckpt.pt"),
    "another shape": (
        ["--init_from=resume", "--out_dir=a", "--max_iters=5", "--hidden_size=64"], None,
        r"hidden_size is set to 64, but the model in a/ckpt.pt has 32"),
    "another text": (
        ["--init_from=resume", "--out_dir=a", "--max_iters=5", "--dataset=other"], None,
        r"data/other differs from what a/ckpt.pt was trained on: .*--init_from=a/ckpt.pt --block_size=16 and a new"),
    "poisoned checkpoint": (
        ["--init_from=resume", "--out_dir=a", "--max_iters=5"], poisoned_checkpoint,
        r"at iteration 4, which was not saved: lower learning_rate"),
    "a file for a folder": (["--out_dir=data/text/meta.json"], None, r"meta.json cannot be written to .*out_dir"),
    "a log on a full disk": (
        ["--init_from=resume", "--out_dir=a", "--max_iters=5"],
        lambda: os.symlink("/dev/full", f"a/log.csv.{os.getpid()}.tmp"),
        r"No space left on device: the disk is full: free some"),
    "out_dir that is not UTF-8": (["--out_dir=caf\udce9"], None, r"--out_dir is not UTF-8"),
    "no such release": (["--init_from=instuct"], None, r"did you mean instruct"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(place, case, capfd):
    flags, prepare, message = ERRORS[case]
    write_dataset(place / "data/other", TEXT[:2000], TEXT[2000:2500], vocab_size=256)
    assert run("--out_dir=a", "--max_iters=3") == 0
    if prepare:
        prepare()
    capfd.readouterr()
    before = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    text = str(run(*flags))
    assert text.startswith("error: ") and re.search(message, text) and "\n" not in text
    after = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file() and path.name != "log.csv"}
    assert after == {path: content for path, content in before.items() if path.name != "log.csv"}


def test_a_full_disk(place, monkeypatch):
    assert run("--out_dir=a", "--max_iters=3") == 0
    before = Path("a/ckpt.pt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    text = run("--out_dir=a", *RESUME)
    assert text.startswith("error: a/ckpt.pt could not be written") and "No space left" in text
    assert Path("a/ckpt.pt").read_bytes() == before
    assert sorted(os.listdir("a")) == ["ckpt.pt", "log.csv", "loss.png"]


def test_out_of_memory(place, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.SmolLM2, "forward", full)
    assert run("--out_dir=a").startswith("error: out of memory (CUDA out of memory): lower batch_size (4)")


# ---- A new run over an old one


@pytest.mark.parametrize("weights", ["a/best.pt", "link.pt"])
def test_a_run_may_begin_with_the_weights_that_it_replaces(place, weights):
    assert run("--out_dir=a", "--save_best=True", "--eval_interval=12") == 0
    Path("link.pt").symlink_to("a/ckpt.pt")
    last = rows("a")[-1][4]
    assert run("--out_dir=a", f"--init_from={weights}", "--overwrite=True", "--max_iters=1") == 0
    assert rows("a")[1][4] == last and load("a")["iter_num"] == 1 and not Path("a/best.pt").exists()


@pytest.mark.parametrize("flags", [
    ["--tracker=wandb"], ["--sample_interval=1", "--sample_prompt=" + 99 * "word "], ["--num_hidden_layers=3"],
    ["--dataset=nowhere"], ["--device=cuda:7"], ["--init_from=a/best.pt"], ["--batch_size=3"],
    ["--batch_size=3", "--compile=True"],
])  # fmt: skip
def test_a_run_that_is_refused_replaces_nothing(place, monkeypatch, flags):
    """Whatever refuses it: a package, a prompt, shapes, data, a device, weights that are not there, memory."""
    assert run("--out_dir=a", "--max_iters=2") == 0
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    monkeypatch.setitem(sys.modules, "wandb", None)
    forward = train.SmolLM2.forward

    def full(self, idx, *args):
        if len(idx) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, *args)

    monkeypatch.setattr(train.SmolLM2, "forward", full)
    monkeypatch.setattr("lib.machine.check_compiled", lambda config: None)  # half a minute, and it passes
    assert str(run("--out_dir=a", "--init_from=a/ckpt.pt", "--overwrite=True", *flags)).startswith("error: ")
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before


def test_a_resume_takes_new_learning_rates(place):
    """By how far the weights move: the matrices follow muon_learning_rate, the embedding learning_rate."""

    def steps(*flags):
        shutil.copytree("a", "b")
        assert run("--out_dir=b", "--init_from=resume", "--max_iters=3", *flags) == 0
        before, after = load("a")["model"], load("b")["model"]
        shutil.rmtree("b")
        names = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
        return [(after[name] - before[name]).norm().item() for name in names]

    flags = ["--optimizer=muon", "--muon_learning_rate=0.002", "--weight_decay=0", "--warmup_iters=0"]
    assert run("--out_dir=a", "--max_iters=2", *flags) == 0
    hidden, embedding = steps()
    assert steps("--muon_learning_rate=0") == pytest.approx([0, embedding], rel=1e-3)  # not the default
    assert steps("--muon_learning_rate=0.0005") == pytest.approx([hidden / 4, embedding], rel=1e-3)
    assert steps("--learning_rate=0.005", "--min_lr=0.0005") == pytest.approx([hidden, embedding / 2], rel=1e-3)


def test_muon_against_two_optimizers_of_torch(place):
    """The blocks' matrices move as torch.optim.Muon moves them, embedding and norms as AdamW does; resume is exact."""
    flags = ["--optimizer=muon", "--muon_learning_rate=0.02", "--grad_clip=0", "--beta2=0.98"]
    run(*flags, "--out_dir=a")
    run(*flags, "--out_dir=b", "--max_iters=5")
    run("--out_dir=b", *RESUME)
    assert_same("a", "b")

    config = TrainConfig(**load("a")["config"])
    peer = train.build_model(config, "cpu")
    hidden = [p for name, p in peer.named_parameters() if "proj" in name]
    rest = {False: [], True: []}
    for name, p in peer.named_parameters():
        if "proj" not in name:
            rest["norm" in name].append(p)
    adamw = torch.optim.AdamW(
        [dict(params=rest[False], weight_decay=0.1), dict(params=rest[True], weight_decay=0.0)],
        betas=(0.9, 0.98),
        fused=True,
    )
    muon = torch.optim.Muon(hidden, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    data = np.fromfile("data/text/train.bin", "<u2")
    for i in range(12):
        for group, factor in zip([*adamw.param_groups, *muon.param_groups], (1, 1, 2), strict=True):
            group["lr"] = get_lr(config, i) * factor
        x, y = get_blocks(data, 4 * i, 4, 16, mix(config.seed, 0))
        peer(x, y).backward()
        for optimizer in (adamw, muon):
            optimizer.step()
            optimizer.zero_grad()
    for name, p in peer.state_dict().items():
        torch.testing.assert_close(load("a")["model"][name], p, atol=1e-5, rtol=0)

    adamw = ["--optimizer=adamw", "--muon_learning_rate=None", "--max_iters=14"]
    assert "holds the state of muon" in run("--init_from=resume", "--out_dir=b", *adamw)
