"""
Test discover.py: each rival is the model it is named after (transformers is the oracle), the search finds the true
model, and the real weights give the real architecture. Runs with the real weights read only a few tokens.
"""

import hashlib
import json
import re
import zlib
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from networks import llama, save
from safetensors.torch import load_file, save_file
from transformers.models.helium import modeling_helium
from transformers.models.llama import modeling_llama

import discover
from discover import DiscoverConfig, Hypothesis, Reader, compare
from lib.official import SHA256
from lib.weights import config_to_json, expected_shapes
from model import PRESETS

SHAPES_135M = discover.read_shapes(expected_shapes(PRESETS["135M"]), "135M")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Return a function that runs discover.py with settings: (exit code, its output)."""

    def run(**settings):
        monkeypatch.setattr(discover, "FULL_TOKENS", settings.get("context", 2_048))
        with pytest.raises(SystemExit) as stop:
            discover.main(DiscoverConfig(**{"out_dir": str(tmp_path / "out")} | settings))
        code, printed = stop.value.code, capsys.readouterr()
        if isinstance(code, str):  # sys.exit("error: ...")
            assert code.startswith("error: ") and "\n" not in code
            return 1, code
        return code, printed.out + printed.err

    return run


def table(out):
    """Parse the closing table: {parameter: its cells, without the evidence}."""
    lines = out[out.index("parameter   ") :].split("\n\n")[0].splitlines()[1:]
    return {line[:24].strip(): [line[24:35].strip(), *line[35:77].split()] for line in lines}


def rivals(out):
    """Parse the rows of part 2: {(question, rival): (tokens, difference, ratio, verdict)}."""
    rows, question = {}, ""
    for line in out[out.index("question   ") :].split("\n\n")[0].splitlines()[1:-1]:  # the last is about the result
        question = line[:14].strip() or question
        rival, tokens, _, difference, _, ratio, verdict = line[14:].split(maxsplit=6)
        rows[question, rival] = (int(tokens.replace(",", "")), float(difference), float(ratio), verdict)
    return rows


# ---- The rivals
def tiled(states, n):
    return states.repeat(1, n, 1, 1)  # KV heads 0 1 2 0 1 2 ..., where repeat_kv gives 0 0 1 1 2 2


def gated_by_up(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("rival", [
    {}, {"rope_layout": "interleaved"}, {"head_dim": 32}, {"kv_grouping": "tiled"}, {"gate": "up_proj"},
    {"hidden_act": "gelu"}, {"hidden_act": "relu"}, {"norm_order": "swapped"}, {"rope_theta": 500.0},
    {"rms_norm_eps": 0.1},
    {"rope_layout": "interleaved", "kv_grouping": "tiled", "norm_order": "swapped", "gate": "up_proj"},
])  # fmt: skip
def test_rival_is_that_model_in_transformers(rival):
    hypothesis = Hypothesis(head_dim=16)._replace(**rival)
    D = hypothesis.head_dim
    oracle = llama(
        hidden_size=96, num_attention_heads=192 // D, num_key_value_heads=64 // D, head_dim=D,
        hidden_act=hypothesis.hidden_act, rms_norm_eps=hypothesis.rms_norm_eps, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": hypothesis.rope_theta},
    )  # fmt: skip
    tensors = {name: w.detach().clone() for name, w in oracle.model.state_dict(prefix="model.").items()}
    ids = torch.randint(96, (65,), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        for layer in oracle.model.layers if hypothesis.norm_order == "swapped" else ():
            norms = layer.input_layernorm, layer.post_attention_layernorm
            layer.post_attention_layernorm, layer.input_layernorm = norms
        interleaved = hypothesis.rope_layout == "interleaved"  # Helium is Llama with this layout
        rotate = (modeling_helium if interleaved else modeling_llama).apply_rotary_pos_emb
        repeat = tiled if hypothesis.kv_grouping == "tiled" else modeling_llama.repeat_kv
        forward = gated_by_up if hypothesis.gate == "up_proj" else modeling_llama.LlamaMLP.forward
        with (
            patch.object(modeling_llama, "apply_rotary_pos_emb", rotate),
            patch.object(modeling_llama, "repeat_kv", repeat),
            patch.object(modeling_llama.LlamaMLP, "forward", forward),
        ):
            expected = F.cross_entropy(oracle(ids[None, :-1]).logits[0], ids[1:], reduction="none")
            given_less = F.cross_entropy(oracle(ids[None, 8:-1]).logits[0], ids[9:], reduction="none")
        shapes = discover.read_shapes({name: tuple(w.shape) for name, w in tensors.items()}, "folder")
        reader = Reader(shapes, tensors, ids)
        nll, plain = reader.measure(hypothesis, 64), reader.measure(Hypothesis(head_dim=16), 64)
        assert (reader.read(hypothesis, 8, 64) - given_less).abs().max() < 1e-4
    assert (nll - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 0.01 or not rival  # it is a different model


# ---- The statistics and the search
def test_neighboring_tokens_do_not_count_as_independent():
    torch.manual_seed(0)
    independent = torch.randn(100_000)
    in_runs = torch.randn(12_500).repeat_interleave(8)  # eight equal values in a row count as one
    for d, error in ((independent, 100_000**-0.5), (in_runs, 12_500**-0.5)):
        difference = compare(d + 5.0, torch.full_like(d, 5.0))
        assert difference.error == pytest.approx(error, rel=0.1)
        assert difference.mean == pytest.approx(d.mean().item(), abs=1e-6)


def test_a_rival_is_ruled_out_by_two_standard_errors_and_the_floor():
    assert discover.Difference(0.02, 0.009).verdict == "ruled out"
    assert discover.Difference(0.02, 0.011).verdict == "inconclusive"  # within two standard errors
    assert discover.Difference(0.0009, 0.0001).verdict == "inconclusive"  # bfloat16 can cause this
    assert discover.Difference(-0.02, 0.009).verdict == "better"
    assert discover.Difference(-0.0009, 0.0001).verdict == "inconclusive"


class FakeReader(Reader):
    """Pretend that `truth` is the true hypothesis: each field that differs from it adds its cost to the NLL."""

    def __init__(self, truth, costs=(), ends=10**9):
        super().__init__(None, None, None)
        self.truth, self.costs, self.ends = truth, dict(costs), ends

    def read(self, hypothesis, start, stop):
        text = torch.randn(20_000, generator=torch.Generator().manual_seed(0))[start:stop] + 3.0  # the same for all
        seed = zlib.crc32(repr(tuple(hypothesis)).encode())
        noise = torch.randn(stop - start, generator=torch.Generator().manual_seed(seed))
        wrong = [name for name in Hypothesis._fields if getattr(hypothesis, name) != getattr(self.truth, name)]
        beyond = torch.arange(stop - start) >= self.ends
        return text + 0.05 * noise + sum(self.costs.get(name, 0.5) for name in wrong) + 2.0 * beyond


RIVALS = {
    "rope_layout": ("half-split", "interleaved"), "head_dim": (32, 64), "kv_grouping": ("repeated", "tiled"),
    "gate": ("gate_proj", "up_proj"), "hidden_act": ("silu", "gelu", "relu"), "norm_order": ("as named", "swapped"),
    "rope_theta": (1e4, 1e5, 1e6), "rms_norm_eps": (1e-6, 1e-5, 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("truth", [
    Hypothesis(), Hypothesis(rope_layout="interleaved", rope_theta=1e4),
    Hypothesis("interleaved", 32, "tiled", "up_proj", "relu", "swapped", 1e6, 1e-3),
])  # fmt: skip
def test_search_finds_the_truth(truth):
    hypothesis, differences = discover.search(FakeReader(truth), Hypothesis(), RIVALS, 1_024, 2_048)
    assert hypothesis == truth
    for question, values in RIVALS.items():  # every rival was compared with the true one, and is ruled out
        assert set(differences[question]) == set(values) - {getattr(truth, question)}
        for difference in differences[question].values():
            assert difference.verdict == "ruled out" and 0.4 < difference.mean < 0.6


def test_search_reports_the_values_it_cannot_distinguish():
    reader = FakeReader(Hypothesis(), {"rms_norm_eps": 0.0, "rope_theta": 0.003})
    hypothesis, differences = discover.search(reader, Hypothesis(), RIVALS, 1_024, 16_384)
    assert hypothesis == Hypothesis()
    assert not any(difference.verdict == "ruled out" for difference in differences["rms_norm_eps"].values())
    assert all(difference.verdict == "ruled out" for difference in differences["rope_theta"].values())
    assert max(len(nll) for rival, nll in reader.measured.items() if rival.rope_theta != 1e5) == 16_384  # reads further
    sources = {"GGUF header": None, "config.json": {name: None for name in Hypothesis._fields} | {"rms_norm_eps": 1e-6}}
    finding = discover.conclude_from_behavior(SHAPES_135M, hypothesis, differences, sources)["rms_norm_eps"]
    assert (finding.value, finding.decided_by) == (1e-6, "config.json")
    assert sorted(finding.remaining) == [1e-6, 1e-5, 1e-3]


@pytest.mark.parametrize("ends, expected", [(10**9, (4_096, None)), (2_816, (2_560, 3_072)), (2_048, (2_048, 2_560))])
def test_reach_ends_when_reading_breaks_down(ends, expected):
    assert discover.find_reach(FakeReader(Hypothesis(), ends=ends), Hypothesis(), 1_024, 4_096) == expected


@pytest.mark.parametrize("reach, limit, fit, unfit", [
    (4_096, None, [4_096, 8_192, 131_072], [1_024, 2_048]),
    (10_240, 11_264, [8_192], [2_048, 4_096, 16_384]),
])  # fmt: skip
def test_contexts_that_the_reach_leaves(reach, limit, fit, unfit):
    for claim in fit + unfit:
        finding = discover.conclude_context(reach, limit, {"config.json": {"max_position_embeddings": claim}})
        assert finding.value == (claim if claim in fit else reach)
        assert (claim in finding.remaining) == (claim in fit)


# ---- The family in small: the same ratios of heads, saved by transformers
def stand_in(path, heads, kv_heads, head_dim, mlp, **changes):
    shapes = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=mlp)
    return save(path, llama(hidden_size=heads * head_dim, **shapes, **changes))


@pytest.mark.parametrize("shape, vocab_size", [
    ((15, 5, 8, 320), 96), ((32, 32, 4, 512), 96), ((9, 3, 16, 384), 49_152),  # 360M, 1.7B; 135M with all its tokens
])  # fmt: skip
def test_every_size_of_the_family_gives_its_shape(tmp_path, run, shape, vocab_size):
    path = stand_in(tmp_path / "folder", *shape, vocab_size=vocab_size)
    code, out = run(init_from=str(path), context=512)
    heads, kv_heads, head_dim, mlp = shape
    cells = table(out)
    expected = dict(
        vocab_size=vocab_size, hidden_size=heads * head_dim, num_hidden_layers=2, intermediate_size=mlp,
        head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    assert {key: int(cells[key][0].replace(",", "")) for key in expected} == expected
    assert cells["rope_theta"] == ["20,000", "20,000", "-", "-"]  # it cannot read the text, so
    assert "these weights cannot predict the text" in out  # it believes the config
    total = sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())
    assert f"{total:,} values" in out and re.search(rf"total +{total:,} ", out)
    assert "3. Proof" not in out and code == 0 and not (tmp_path / "out").exists()


def test_config_that_contradicts_the_shapes(tmp_path, run):
    path = stand_in(tmp_path / "folder", 15, 5, 8, 320)
    config = json.loads((path / "config.json").read_text()) | dict(num_hidden_layers=4, vocab_size=95)
    (path / "config.json").write_text(json.dumps(config))
    code, out = run(init_from=str(path))
    assert code == 1 and "the weights rule out the config.json's 95 and 4:" in out
    assert "* num_hidden_layers is 2, not 4: model.layers.0 to 1" in out
    assert "* vocab_size is 96, not 95: embed_tokens [96, 120]" in out
    assert table(out)["num_hidden_layers"] == ["2", "4*", "-", "-"]


@pytest.mark.parametrize("name, shape, named", [  # shape: of a new or changed tensor; none removes it
    ("model.layers.1.self_attn.q_proj.bias", (120,), "model.layers.1.self_attn.q_proj.bias is [120]"),
    ("lm_head.weight", (96, 120), " lm_head.weight,"),
    ("model.layers.1.mlp.up_proj.weight", (320, 60), "model.layers.1.mlp.up_proj.weight is [320, 60]"),
    ("model.layers.1.mlp.down_proj.weight", None, "down_proj.weight is missing"),
    ("model.embed_tokens.weight", None, "it has no model.embed_tokens.weight"),
])  # fmt: skip
def test_different_models_are_refused_by_name(tmp_path, run, name, shape, named):
    path = stand_in(tmp_path / "folder", 15, 5, 8, 320)
    tensors = load_file(path / "model.safetensors") | {name: torch.zeros(shape or ())}
    save_file({n: tensor for n, tensor in tensors.items() if shape or n != name}, path / "model.safetensors")
    code, out = run(init_from=str(path))
    assert code == 1 and named in out


def test_a_context_that_is_too_short(capsys):
    with pytest.raises(SystemExit, match="2"):
        discover.main(DiscoverConfig(context=2_047))
    assert "--context=2047 is too short: rivals are compared on 2048 tokens" in capsys.readouterr().err


# ---- The real weights, on few tokens
def is_official(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() == SHA256["HuggingFaceTB/SmolLM2-135M"]["config.json"]


def test_proof_compares_every_byte(tmp_path, capsys):
    sources = {"config.json": None, "GGUF header": None}
    all_out = {name: {} for name in Hypothesis._fields}
    findings = discover.conclude_from_shapes(SHAPES_135M)
    findings |= discover.conclude_from_behavior(SHAPES_135M, Hypothesis(), all_out, sources)
    findings["max_position_embeddings"] = discover.conclude_context(8_192, None, sources)
    assert discover.prove(findings, sources, tmp_path / "config.json") and is_official(tmp_path / "config.json")
    assert sources["config.json"]["rope_theta"] == 100_000  # the hash proves the official file's claims
    findings["rope_theta"] = findings["rope_theta"]._replace(value=50_000.0)
    assert not discover.prove(findings, sources, tmp_path / "config.json")
    assert "but the official file's is" in capsys.readouterr().out and not is_official(tmp_path / "config.json")


def test_base(tmp_path, run, monkeypatch):
    monkeypatch.setattr(discover, "THETAS", (1e4, 5e4, 1e5))
    code, out = run(context=512, plot=True)
    assert (tmp_path / "out" / "discover.png").read_bytes().startswith(b"\x89PNG")
    assert code == 0 and "272 tensors, 134,515,008 values" in out, out
    rows = rivals(out)
    tokens, difference, ratio, verdict = rows["rope_theta", "10,000"]
    assert (tokens, verdict) == (512, "ruled out") and 0.15 < difference < 0.3 and ratio > 5
    assert rows["rope_theta", "50,000"][3] == "inconclusive"
    gross = {question for question, _ in rows} - {"rope_theta", "rms_norm_eps"}
    assert gross == {"rope_layout", "head_dim", "kv_grouping", "gate", "hidden_act", "norm_order"}
    for (question, rival), (_, difference, ratio, verdict) in rows.items():
        if question in gross:
            assert verdict == "ruled out" and difference > 0.5 and ratio > 5, (question, rival)
    assert rows["rms_norm_eps", "1e-06"][3] == "inconclusive" and rows["rms_norm_eps", "0.001"][3] == "ruled out"

    cells = table(out)
    assert cells["rope_theta"] == ["100,000", "100,000", "10,000*", "100,000"]
    assert cells["max_position_embeddings"][0] == "8,192" and cells["rope_layout"][0] == "half-split"
    assert "the weights rule out the training YAML's 10,000:\n" in out
    assert "\n* rope_theta is 100,000 or 50,000, not 10,000: with 10,000, NLL +0.2" in out
    assert "rope_theta: the evidence leaves 100,000 or 50,000; the GGUF header decides" in out
    assert "which is the official file's" in out and is_official(tmp_path / "out" / "config.json")


def test_a_folder_that_contradicts_its_config(tmp_path, run, monkeypatch, release):
    """Its q and k are interleaved, and its config says theta 10,000. Fewer questions make the run take seconds."""
    monkeypatch.setattr(discover, "THETAS", (1e4, 1e5))
    monkeypatch.setattr(discover, "EPSILONS", (1e-5, 1e-3))
    monkeypatch.setattr(discover, "ACTIVATIONS", {"silu": F.silu})
    monkeypatch.setattr(discover, "find_head_dims", lambda shapes, claimed: [64])
    path = tmp_path / "folder"
    path.mkdir()
    moved = {  # row i of a head goes to 2i, row i + 32 to 2i + 1, as in llama.cpp
        name: w.view(-1, 2, 32, 576).transpose(1, 2).reshape(w.shape) if re.search("[qk]_proj", name) else w
        for name, w in release.read().items()
    }
    save_file({name: tensor.bfloat16() for name, tensor in moved.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_to_json(release.config, rope_theta=10_000)))
    code, out = run(init_from=str(path), context=512)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert code == 1 and (written["rope_theta"], written["rope_interleaved"]) == (100_000, True)
    margin = re.search(r"\* rope_theta is 100,000, not 10,000: with 10,000, NLL \+(\S+) ± \S+ \((\S+) standard", out)
    assert 0.15 < float(margin[1]) < 0.3 and float(margin[2]) > 5
    assert table(out)["rope_theta"] == ["100,000", "10,000*", "10,000*", "100,000"]  # after the layout is found
    assert "* rope_layout is interleaved, not half-split: with half-split, NLL +2." in out
    assert table(out)["rope_layout"] == ["interleaved", "half-split*", "half-split*", "half-split*"]
    assert "the release's own config.json contradicts the evidence" in out
