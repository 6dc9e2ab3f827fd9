"""bench.py: its table, its JSON, and that its competitors are the same network. Not its timings."""

import inspect
import json
from configurator import configure

import pytest
import torch

import bench
from bench import BenchConfig, SpeedTable


def test_ratios_are_of_medians(capsys):
    table = SpeedTable()
    table.row("x", "s", "seconds", dict(ours=dict(seconds=[1, 9, 2]), peer=dict(seconds=[4]), limit=dict(seconds=[1])))
    spread = dict(ours=[1, 9], peer=[4, 4], limit=[1, 1])
    assert table.rows["x"] == dict(unit="s", ours=2, peer=4, limit=1, ratio=0.5, share=2.0, spread=spread)
    assert capsys.readouterr().out.splitlines()[-1].split() == "x 2.00 4.00 - - 1.00 s 0.50 - - 2.00 1 to 9".split()


def test_bars_are_shares_of_the_limit(monkeypatch):
    rows = dict(
        train=dict(unit="tok/s", ours=60.0, peer=20.0, peer_tuned=40.0, limit=80.0),
        memory=dict(unit="GB", ours=1.0, peer=2.0),
        decode=dict(unit="tok/s", ours=30.0, peer=10.0, llama_cpp=44.0, limit=40.0),
    )
    saved = []
    monkeypatch.setattr(bench, "save_picture", lambda figure, path: saved.append(figure))
    bench.draw(rows, "out/bench.png")
    axes = saved[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["train", "decode"]
    bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert bars == {
        "transformers": [0.25, 0.25], "transformers, tuned": [0.5], "llama.cpp": [1.1], "this project": [0.75, 0.75]
    }  # fmt: skip


def test_every_row_with_a_gpu(capsys, monkeypatch):
    """An H100 at 388,061 tokens per second: 40 % of its peak, at T = 2,048. The last line is JSON."""
    measured = []

    def in_turn(repeats, **competitors):
        measured.extend(competitors.values())
        speed, both = dict(tok_per_s=[388_061]), dict(tok_per_s=[388_061], memory=[9.0])
        return {who: dict(speed if who == "limit" else both) for who in competitors}

    monkeypatch.setattr(bench, "in_turn", in_turn)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.main(configure(BenchConfig, []))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"cpu", "threads", "dtype", "rows"}
    shapes = ("b4_t256", "b8_t256", "b1_t2048", "b3_t128")
    names = {f"{kind}_{shape}" for kind in ("train", "memory") for shape in shapes}
    names |= {f"gpu_{kind}_{shape}" for kind in ("train", "memory", "mfu") for shape in ("b16_t1024", "b8_t2048")}
    names |= {"decode_b1", "decode_b8", "decode_b1_t1024", "gpu_decode_b1", "gpu_decode_b64"}
    assert set(found["rows"]) - {"decode_b1_fp32"} == names
    assert found["rows"]["gpu_mfu_b8_t2048"]["ours"] == pytest.approx(40.0, abs=1e-3)
    for function, *arguments in measured:
        inspect.signature(function).bind(*arguments)


def test_ours_and_the_peer_are_the_same_network():
    ours, peer = bench.ours(), bench.peer()
    assert ours.training and peer.training
    shapes = {name: p.shape for name, p in peer.named_parameters()}
    for network in (ours, bench.shapes_alone()):
        assert {name: p.shape for name, p in network.named_parameters()} == shapes
    peer.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.arange(40)[None]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.allclose(ours(ids), peer(input_ids=ids).logits, atol=1e-3)


def test_a_row_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        configure(BenchConfig, ["--rows=train,speed"])
    assert stop.value.code == 2 and "there is no speed; name some of train,decode" in capsys.readouterr().err
