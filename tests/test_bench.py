"""Test bench.py: its table, JSON and picture, and that competitors are the same model. Timings are not tested."""

import inspect
import json
from configurator import configure

import pytest
import torch

import bench
from bench import BenchConfig, add_row


def test_ratios_are_of_medians(capsys):
    rows = {}
    seconds = dict(this=[1, 9, 2], transformers=[4], limit=[1])
    add_row(rows, "x", "s", "seconds", {name: dict(seconds=values) for name, values in seconds.items()})
    ranges = dict(this=[1, 9], transformers=[4, 4], limit=[1, 1])
    medians, ratios = dict(this=2, transformers=4, limit=1), dict(transformers=0.5, limit=2.0)
    assert rows["x"] == dict(unit="s", medians=medians, ratios=ratios, ranges=ranges)
    assert capsys.readouterr().out.splitlines()[-1].split() == "x 2.00 4.00 - - 1.00 s 0.50 - - 2.00 1 to 9".split()


def test_bars_are_shares_of_the_limit(monkeypatch, capsys):
    """Two rows of each kind are drawn, the fastest competitor on top, with its speed next to the bar."""
    rows = {}
    for name, unit, speeds in (
        ("train, 4 x 256 tokens", "tok/s", dict(this=60.0, transformers=20.0, tuned=40.0, limit=80.0)),
        ("memory, 4 x 256 tokens", "GB", dict(this=1.0, transformers=2.0)),
        ("decode, batch 1", "tok/s", dict(this=30.0, transformers=10.0, llama_cpp=44.0, limit=40.0)),
        ("decode, batch 8", "tok/s", dict(this=90.0, transformers=30.0, limit=100.0)),
        ("decode, batch 1, fp32", "tok/s", dict(this=20.0, transformers=10.0, limit=40.0)),
    ):
        add_row(rows, name, unit, "figure", {competitor: dict(figure=[speed]) for competitor, speed in speeds.items()})
    saved = []
    monkeypatch.setattr(bench, "save_picture", lambda figure, path: saved.append(figure))
    bench.draw(rows, "this machine, 2026-11-28", "out/bench.png")
    axes = saved[0].axes[0]
    assert axes.get_title() == "this machine, 2026-11-28"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["train, 4 x 256 tokens", "decode, batch 1", "decode, batch 8"]
    bars = [(bars.get_label(), bars[0].get_width()) for bars in axes.containers]
    assert bars == [
        ("this project", 0.75), ("transformers, tuned", 0.5), ("transformers", 0.25),
        ("llama.cpp", 1.1), ("this project", 0.75), ("transformers", 0.25),
        ("this project", 0.9), ("transformers", 0.3),
    ]  # fmt: skip
    assert axes.containers[3][0].get_y() < axes.containers[4][0].get_y()  # the axis points down
    assert [text.get_text() for text in axes.texts][:4:3] == ["60 tok/s, 3.0 x transformers", "44 tok/s"]


def test_every_row_with_a_gpu(capsys, monkeypatch):
    """Pretend to be an H100 at 388,061 tokens per second, 40 % of its peak at T = 2,048. The last line is JSON."""
    measured = []

    def take_turns(repeats, **competitors):
        measured.extend(competitors.values())
        speed, both = dict(tok_per_s=[388_061]), dict(tok_per_s=[388_061], memory=[9.0])
        return {name: dict(speed if name == "limit" else both) for name in competitors}

    monkeypatch.setattr(bench, "take_turns", take_turns)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.main(configure(BenchConfig, []))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(printed) == {"cpu", "threads", "dtype", "rows"}
    shapes = ("4 x 256", "8 x 256", "1 x 2,048", "3 x 128")
    names = {f"{kind}, {shape} tokens" for kind in ("train", "memory") for shape in shapes}
    shapes = ("16 x 1,024", "8 x 2,048")
    names |= {f"GPU {kind}, {shape} tokens" for kind in ("train", "memory", "MFU") for shape in shapes}
    names |= {"decode, batch 1", "decode, batch 8", "decode, batch 1, prompt 1,024"}
    names |= {"GPU decode, batch 1", "GPU decode, batch 64"}
    assert set(printed["rows"]) - {"decode, batch 1, fp32"} == names
    assert printed["rows"]["GPU MFU, 8 x 2,048 tokens"]["medians"]["this"] == pytest.approx(40.0, abs=1e-3)
    for function, *arguments in measured:
        inspect.signature(function).bind(*arguments)


def test_competitors_are_the_same_model():
    model, oracle = bench.build_model("this"), bench.build_model("transformers")
    assert model.training and oracle.training and model.compiled  # by block, as train.py does on a CPU
    oracle.load_state_dict(model.state_dict(), strict=False)
    ids = torch.arange(40)[None]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.allclose(model(ids), oracle(input_ids=ids).logits, atol=1e-3)


def test_an_unknown_row(capsys):
    with pytest.raises(SystemExit) as stop:
        configure(BenchConfig, ["--rows=train,speed"])
    assert stop.value.code == 2 and "unknown row speed; choose from train,decode" in capsys.readouterr().err
