"""
How do you know? The official weights go in; every number of the architecture comes out, with its evidence.

    python discover.py                              the base release, or its stand-in from the wheel: 80 s on two cores
    python discover.py --context=8192 --plot=True   read as far as the release can; draw out/discover.png
    python discover.py --official=my/folder         another release: 360M, 1.7B, a folder, a .gguf

1. Names and shapes tell most of it. config.json is not believed: what it claims is compared at the end.
2. Behaviour tells the rest. The same weights read the same text as rival networks would, each changed in one
   respect; what they were trained as predicts the text best. Differences are paired, token by token. Their
   standard error takes 32 tokens in a row as one observation, for neighbours are not independent. It speaks for
   more text of this kind, not for the weights, so a rival is out only when it is worse both by two standard errors
   and by 0.001 nats: bfloat16, in which the network was trained, moves the mean by as much. Rivals that are not
   out are not told apart, and then the first public source that names one of them decides.
3. Proof: the 135M's config.json, written from what was found, has the sha256 of the official one.

Exit code 1 when the evidence contradicts the release's own config, or the proof of base fails.
"""

import contextlib
import hashlib
import io
import json
import os
import pydoc_data.topics
import sys
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from configurator import configure, reject
from model import ModelConfig, SmolLM2, parameter_table, rope_tables
from official import SHA256, describe, find_release, load_state_dict, read_config, wheel_gguf
from tokenizer import VOCAB_SIZE, encode, load_tokenizer


@dataclass(frozen=True)
class DiscoverConfig:
    """Find the architecture from the weights, and hold every public source's claims against it."""

    official: str = "base"  # base, instruct, 360M, ..., wheel, hub:org/name, a folder, a .gguf
    tokens: int = 2_048  # of text, on which rival networks are compared
    context: int = 4_096  # how far the text is read; 8192 tells theta 50,000 from 100,000; past 10,240 it breaks
    plot: bool = False  # draw the theta curve and NLL by position to out_dir/discover.png
    out_dir: str = "out"  # for config.json and discover.png


# text/pretraining/smollm2/config_smollm2_135M.yaml of github.com/huggingface/smollm, its model_config.
TRAINING_YAML = dict(
    bos_token_id=0, eos_token_id=0, hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664,
    intermediate_size=1536, is_llama_config=True, max_position_embeddings=2048, num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False,
    rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=True, use_cache=True, vocab_size=49152,
)  # fmt: skip
# What the base config.json holds that no weight can tell: seven fields of the YAML, and five that transformers wrote.
FROM_YAML = {
    name: TRAINING_YAML[name]
    for name in ("bos_token_id", "eos_token_id", "initializer_range", "is_llama_config", "pretraining_tp",
                 "rope_scaling", "use_cache")
}  # fmt: skip
FROM_HABIT = dict(
    architectures=["LlamaForCausalLM"], attention_dropout=0.0, model_type="llama", torch_dtype="bfloat16",
    transformers_version="4.40.1",
)  # fmt: skip
PYTHON = sys.version.split()[0]
CONFIG_SHA256 = SHA256["HuggingFaceTB/SmolLM2-135M"]["config.json"]

GLANCE = 256  # tokens: enough to be rid of a rival that cannot read at all
BLOCK = 32  # tokens in a row that count as one observation
FLOOR = 0.001  # nats per token: no difference below it is evidence
LOSS = 0.1  # nats per token: what reading beyond the context costs, and more
BEYOND = 1.5  # a network reads a little past the context it was trained on (measured: 10,240 of 8,192), never so far
THETAS = (1e3, 1e4, 3e4, 5e4, 1e5, 2e5, 5e5, 1e6)
EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3)
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


# ---------------------------------------------------------------------------------------------
# 1. Names and shapes


class Shapes(NamedTuple):
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    q_width: int  # query heads x head_dim: the shapes do not tell which
    kv_width: int  # key/value heads x head_dim


SHAPES_135M = Shapes(49_152, 576, 30, 1_536, 576, 192)


def read_shapes(release, tensors):
    """The Shapes of a state dict; takes a repeated tied head out of it. Another kind of network ends the program."""
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        sys.exit(f"error: {release.path} has biases ({biases[0]}), which model.py does not do")
    head = tensors.pop("lm_head.weight", None)
    try:
        if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
            sys.exit(f"error: {release.path} has an lm_head.weight of its own: model.py ties it to embed_tokens")
        return Shapes(
            *tensors["model.embed_tokens.weight"].shape,
            len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
            len(tensors["model.layers.0.mlp.gate_proj.weight"]),
            len(tensors["model.layers.0.self_attn.q_proj.weight"]),
            len(tensors["model.layers.0.self_attn.k_proj.weight"]),
        )
    except KeyError as error:
        sys.exit(f"error: {release.path} has no tensor {error.args[0]}: it is not a Llama-style network")


def check_tensors(release, tensors, config):
    """Every tensor that such a network has, and no other, in its shape; or one line and out."""
    with torch.device("meta"):  # shapes without memory
        expected = {name: list(tensor.shape) for name, tensor in SmolLM2(config).state_dict().items()}
    here = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in expected | here:
        if here.get(name) != expected.get(name):
            says, other = here.get(name, "missing"), expected.get(name, "no part of the network")
            sys.exit(f"error: {release.path}: {name} is {says}, by the other tensors it should be {other}")


def head_dims(shapes, claimed):
    """The head dimensions that divide both widths: of the multiples of 32, and of what the sources claim."""
    Q, K = shapes.q_width, shapes.kv_width
    fitting = [D for D in sorted({*range(32, 257, 32), *claimed}) if D > 0 and D % 2 == Q % D == K % D == Q % K == 0]
    return fitting or sys.exit(f"error: no head_dim fits a q_proj and a k_proj {Q} and {K} wide")


# ---------------------------------------------------------------------------------------------
# 2. Behaviour


class Network(NamedTuple):
    """What shapes do not tell. The defaults are where the search starts; each is put to the test."""

    rope_layout: str = "half-split"  # RoPE turns the pairs (i, i + D/2); interleaved: (2i, 2i + 1)
    head_dim: int = 64
    kv_grouping: str = "repeated"  # query head h reads KV head h // (H/K); tiled: h % K
    gate: str = "gate_proj"  # which of gate_proj and up_proj goes through the activation
    hidden_act: str = "silu"
    norm_order: str = "as named"  # swapped: input_layernorm before the MLP
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5


class Reader:
    """These weights, reading this text as any Network would."""

    def __init__(self, shapes, tensors, ids):
        self.shapes, self.tensors, self.ids = shapes, tensors, ids
        self.known = {}  # Network: NLL of the tokens from the first on

    def nll(self, network, n):
        """NLL in nats of each of the first n tokens, given all before it: (n,)."""
        if len(self.known.get(network, ())) < n:
            self.known[network] = self.read(network, 0, n)
        return self.known[network][:n]

    def read(self, network, start, stop):
        """NLL of each token from start to stop, given those from start on: (stop - start,)."""
        config = model_config(self.shapes, network, stop - start)
        with torch.device("meta"):  # shapes without memory: all rivals share these weights
            model = SmolLM2(config)
        model.load_state_dict(rearranged(self.tensors, config, network), assign=True)
        model.cos, model.sin = rope_tables(config, stop - start)
        with patch.object(F, "silu", ACTIVATIONS[network.hidden_act]):
            x = model.hidden(self.ids[None, start:stop])[0]  # (T, C)
        head = model.model.embed_tokens.weight
        chunks = zip(x.split(512), self.ids[start + 1 : stop + 1].split(512), strict=True)  # 100 MB of logits each
        return torch.cat([F.cross_entropy(F.linear(h, head), t, reduction="none") for h, t in chunks])


def model_config(shapes, network, length):
    """ModelConfig of a Network that reads `length` tokens."""
    return ModelConfig(
        vocab_size=shapes.vocab_size,
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_hidden_layers=shapes.num_hidden_layers,
        num_attention_heads=shapes.q_width // network.head_dim,
        num_key_value_heads=shapes.kv_width // network.head_dim,
        head_dim=network.head_dim,
        max_position_embeddings=length,
        rope_theta=network.rope_theta,
        rms_norm_eps=network.rms_norm_eps,
    )


def rearranged(tensors, config, network):
    """
    The state dict with which model.py is `network`: another order of rows, heads or parts in the computation
    is the same as the other order in the tensors, exactly.
    """
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    swap = {}
    if network.gate == "up_proj":
        swap |= {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    if network.norm_order == "swapped":
        swap |= {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    state = {}
    for name, w in tensors.items():
        *path, part, _ = name.split(".")
        if network.rope_layout == "interleaved" and part in ("q_proj", "k_proj"):  # a head's row 2i becomes its row i
            w = w.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2)
        if network.kv_grouping == "tiled" and part == "q_proj":  # query head j K + k becomes k H/K + j
            w = w.unflatten(0, (H // K, K, D)).transpose(0, 1).flatten(0, 2)
        if network.kv_grouping == "tiled" and part == "o_proj":
            w = w.unflatten(1, (H // K, K, D)).transpose(1, 2).flatten(1, 3)
        state[".".join((*path, swap.get(part, part), "weight"))] = w
    return state


def text_ids(config):
    """Ids of prose, (context + 1,): the reference manual of the running Python, longest chapters first."""
    text = "\n\n".join(sorted(pydoc_data.topics.topics.values(), key=len, reverse=True))
    ids = encode(load_tokenizer(config.official), text)
    if len(ids) <= config.context:
        reject(f"--context={config.context} is more than the text has: {len(ids):,} tokens")
    return torch.tensor(ids[: config.context + 1])


class Difference(NamedTuple):
    """Of the NLL of two readings of the same tokens: mean, standard error, number of tokens."""

    mean: float
    error: float
    tokens: int

    @property
    def worse(self):
        return self.mean > max(2 * self.error, FLOOR)

    @property
    def better(self):
        return -self.mean > max(2 * self.error, FLOOR)

    @property
    def ratio(self):
        return abs(self.mean) / self.error if self.error else 0.0

    def __str__(self):
        return f"NLL {self.mean:+.2g} ± {self.error:.1g} ({self.ratio:.1f} standard errors)"

    def row(self):
        return f"{self.mean:>+11.3g}{self.error:>10.2g}{self.ratio:>7.1f}"


def paired(nll, other):
    """The Difference of two readings: each token of the one less the same token of the other."""
    d = nll - other
    blocks = d[: len(d) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
    return Difference(d.mean().item(), blocks.std().item() / sqrt(len(blocks)), len(d))


def search(reader, network, rivals, tokens, far):
    """
    Ask every question of `network`; where a rival reads better, go on with that one, until none does.
    rivals: {question, a field of Network: its values}. Returns (network, {question: {rival: Difference}}).
    """
    print(f"\n{'question':<14}{'rival':>12}{'tokens':>8}{'NLL':>9}{'above found':>13}{'error':>8}{'ratio':>7}")
    asked_of, differences = None, {}
    while asked_of != network:
        asked_of = network
        for question, values in rivals.items():
            # A rival is read no further than it takes to be out, or within the floor. Thetas differ at a distance.
            lengths = (tokens, far) if question == "rope_theta" else (GLANCE, tokens)
            differences[question] = {}
            for value in values:
                if value == getattr(network, question):
                    continue
                rival = network._replace(**{question: value})
                for n in lengths:
                    difference = paired(reader.nll(rival, n), reader.nll(network, n))
                    if difference.worse or abs(difference.mean) + 2 * difference.error < FLOOR:
                        break
                verdict = "out" if difference.worse else "better" if difference.better else "not told apart"
                title = question * (not differences[question])
                nll = reader.nll(rival, n).mean()
                print(f"{title:<14}{show(value):>12}{n:>8,}{nll:>9.4f} {difference.row()}  {verdict}", flush=True)
                differences[question][value] = difference
            better = {value: d.mean for value, d in differences[question].items() if d.better}
            if better:
                network = network._replace(**{question: min(better, key=better.get)})
                print(f"so {question} is {show(getattr(network, question))}: every question again, of that network")
    return network, differences


def read_onward(reader, network, tokens, context):
    """
    How far the network reads: each stretch after `tokens`, given all before it, beside the same stretch given
    only the last tokens/2 to tokens before it. Returns (how far without loss, the end of the first stretch with).
    """
    step = tokens // 2
    print(f"\n{'positions':<17}{'NLL':>9}{'above that given only':>23} {step:,} to {tokens:,} tokens")
    for start in range(tokens, context - step + 1, step):
        stop = start + step
        nll = reader.nll(network, context)[start:stop]
        difference = paired(nll, reader.read(network, start - step, stop)[step:])
        lost = difference.worse and difference.mean > LOSS
        verdict = "lost" if lost else "it helps" if difference.better else "no loss"
        print(f"{start:>6,} to {stop:>6,} {nll.mean():>9.4f} {difference.row()}  {verdict}", flush=True)
        if lost:
            return start, stop
    return context, None


# ---------------------------------------------------------------------------------------------
# 3. What is found, and what the public sources say


def public_sources(release, shapes):
    """{source: its claims, or None where it says nothing here}: the release's own is heard first."""
    own = claims(read_config(release), release.path)
    if release.path.suffix == ".gguf":
        said = {"GGUF header": own, "config.json": None, "training YAML": None}
    else:
        said = {"config.json": own, "GGUF header": None, "training YAML": None}
    if shapes == SHAPES_135M:
        said["training YAML"] = claims(TRAINING_YAML, "the training YAML")
        if said["GGUF header"] is None and wheel_gguf():
            said["GGUF header"] = claims(read_config(find_release("wheel")), "the wheel")
    return said


def claims(config, where):
    """What a config.json, or what is read like one, says of each number; absent fields as transformers takes them."""
    rope = config.get("rope_parameters") or {}  # transformers 5 keeps theta in here
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return {
            "vocab_size": int(config["vocab_size"]),
            "hidden_size": hidden,
            "num_hidden_layers": int(config["num_hidden_layers"]),
            "intermediate_size": int(config["intermediate_size"]),
            "attention_bias": config.get("attention_bias", False),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "num_attention_heads": heads,
            "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
            "head_dim": int(config.get("head_dim") or hidden // heads),
            "rope_layout": "interleaved" if config.get("rope_interleaved") else "half-split",
            "kv_grouping": "repeated",  # this and the next are what the names mean
            "gate": "gate_proj",
            "norm_order": "as named",
            "hidden_act": config.get("hidden_act", "silu"),
            "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "max_position_embeddings": int(config.get("max_position_embeddings", 2_048)),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        sys.exit(f"error: the config of {where} describes no network: {type(error).__name__}: {error}")


class Finding(NamedTuple):
    """A line of the table."""

    value: object
    remaining: object  # the values that the evidence leaves: a tuple or a range
    evidence: str
    picked_by: str = ""  # the source that chose among them


def pick(name, value, remaining, evidence, sources):
    """The Finding: `value`, unless the evidence leaves others too and a source names one of them."""
    for source, said in sources.items():
        if len(remaining) > 1 and said and said[name] in remaining:
            return Finding(said[name], remaining, evidence, source)
    return Finding(value, remaining, evidence)


def from_shapes(shapes):
    """{field: Finding} of what names and shapes tell."""
    V, C, layers, intermediate, *_ = shapes
    told = {
        "vocab_size": (V, f"embed_tokens [{V}, {C}]"),
        "hidden_size": (C, f"embed_tokens [{V}, {C}]"),
        "num_hidden_layers": (layers, f"model.layers.0 to {layers - 1}"),
        "intermediate_size": (intermediate, f"gate_proj [{intermediate}, {C}]"),
        "attention_bias": (False, "no tensor is named bias"),
        "tie_word_embeddings": (True, "no other head than embed_tokens"),
    }
    return {name: Finding(value, (value,), evidence) for name, (value, evidence) in told.items()}


def from_behaviour(shapes, network, differences, sources):
    """{field: Finding} of what the rivals' readings tell."""
    findings = {}
    for name, rivals in differences.items():
        value, out = getattr(network, name), {rival: d for rival, d in rivals.items() if d.worse}
        nearest = min(out, key=lambda rival: out[rival].mean, default=None)
        evidence = f"{show(nearest)}: {out[nearest]}" if out else "not told apart"
        findings[name] = pick(name, value, (value, *(rival for rival in rivals if rival not in out)), evidence, sources)
        if name == "head_dim":
            Q, K, D = shapes.q_width, shapes.kv_width, findings[name]
            for heads, part, width in (("num_attention_heads", "q_proj", Q), ("num_key_value_heads", "k_proj", K)):
                evidence = f"{part} [{width}, {shapes.hidden_size}] / head_dim"
                findings[heads] = Finding(width // D.value, tuple(width // d for d in D.remaining), evidence)
    return findings


def from_reading_on(reach, limit, sources):
    """The Finding of a context from how far the network reads, as read_onward returns it."""
    evidence = f"reads {reach:,} tokens without loss" + (f", but not {limit:,}" if limit else "")
    return pick("max_position_embeddings", reach, range(int(reach / BEYOND), limit or sys.maxsize), evidence, sources)


def show(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1 else f"{value:g}"
    if isinstance(value, tuple):
        return " or ".join(map(show, value))
    if isinstance(value, range):
        return f"{value.start:,} " + (f"to {value.stop:,}" if value.stop < sys.maxsize else "or more")
    return "-" if value is None else str(value)


def print_table(findings, sources):
    columns = ("config.json", "training YAML", "GGUF header")
    titles = "".join(f"{title:>14}" for title in columns)
    print(f"\n{'parameter':<24}{'value':>11}{titles}   evidence (the nearest rival that is out)")
    for name, finding in findings.items():
        claims = [sources[title] and sources[title][name] for title in columns]
        cells = [f"{show(claim):>12}" + " *"[claim is not None and claim not in finding.remaining] for claim in claims]
        print(f"{name:<24}{show(finding.value):>11}", *cells, f" {finding.evidence}")
    print()
    for name, finding in findings.items():
        if finding.picked_by:
            print(f"{name}: the evidence leaves {show(finding.remaining)}; the {finding.picked_by} decides")


def conflicts(findings, sources, differences):
    """{source: [a line on each of its claims that the evidence rules out]}, for the sources that have such."""
    lines = {}
    for source, said in sources.items():
        for name, finding in findings.items():
            if said and said[name] not in finding.remaining:
                margin = differences.get(name, {}).get(said[name])
                reason = f"under {show(said[name])}, {margin}" if margin else finding.evidence
                line = f"* {name}: the {source} says {show(said[name])}, the weights {show(finding.value)}: {reason}"
                lines.setdefault(source, []).append(line)
    return lines


def write_config(findings, path):
    """config.json of the base release, written from the findings. Returns it as text."""
    found = {name: finding.value for name, finding in findings.items()}
    interleaved = found.pop("rope_layout") == "interleaved"
    for name in ("head_dim", "kv_grouping", "gate", "norm_order"):  # it has no field for these
        del found[name]
    found |= {"rope_interleaved": interleaved, "rope_theta": round(found["rope_theta"])}
    content = json.dumps(FROM_YAML | FROM_HABIT | found, indent=2, sort_keys=True) + "\n"
    write(path, content.encode())
    return content


def write(path, content):
    """The bytes `content` to `path`, whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        sys.exit(f"error: {path} could not be written ({error.strerror}): give another --out_dir")


def prove(findings, sources, path):
    """Write config.json, say where its fields come from and whether it is the official one: True or False."""
    content = write_config(findings, path)
    written = [name for name in json.loads(content) if name not in FROM_YAML | FROM_HABIT]
    picked = [name for name in written if name in findings and findings[name].picked_by]
    print("\n3. Proof: the base release's config.json, written from\n")
    print("evidence alone      ", ", ".join(name for name in written if name not in picked))
    print("evidence and source ", ", ".join(picked))
    print("taken as known      ", f"{', '.join(FROM_YAML)}: from the training YAML")
    print("                    ", f"{', '.join(FROM_HABIT)}: as transformers writes them")
    digest = hashlib.sha256(content.encode()).hexdigest()
    same = digest == CONFIG_SHA256
    print(f"\n{path}: {len(content)} bytes, sha256 {digest},")
    print("which is the official file's" if same else f"but the official file's is {CONFIG_SHA256}")
    if same and sources["config.json"] is None:  # so its content is known
        sources["config.json"] = claims(json.loads(content), path)
    return same


def draw(reader, network, sources, tokens, context, path):
    """The theta curve, and NLL by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    claimed = {source: said["rope_theta"] for source, said in sources.items() if said}
    readings = {theta: reader.nll(network._replace(rope_theta=theta), context) for theta in claimed.values()}
    for rival, nll in reader.known.items():
        if rival == network._replace(rope_theta=rival.rope_theta):
            readings[rival.rope_theta] = nll
    for n, style in {tokens: "o-", context: "s--"}.items():
        long_enough = {theta: nll[:n] for theta, nll in sorted(readings.items()) if len(nll) >= n}
        curve = {theta: paired(nll, long_enough[network.rope_theta]) for theta, nll in long_enough.items()}
        means, errors = [d.mean for d in curve.values()], [2 * d.error for d in curve.values()]
        left.errorbar([*curve], means, errors, fmt=style, capsize=3, label=f"on the first {n:,} tokens")
    for theta in set(claimed.values()):
        names = "\n".join(source for source in claimed if claimed[source] == theta)
        left.axvline(theta, color="grey", linewidth=0.8, linestyle=":")
        left.text(theta, 0.98, names, transform=left.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    left.set_xscale("log")
    left.set_yscale("symlog", linthresh=0.01)
    left.set_ylim(-0.02, 300)
    ticks = [-0.01, 0, 0.01, 0.1, 1, 10]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.set(xlabel="rope_theta", ylabel=f"NLL above theta {show(network.rope_theta)}'s, ± 2 standard errors")
    left.set_title("Which theta reads best")
    left.legend(loc="lower left")

    width = context // 16
    for theta, nll in sorted(readings.items()):
        if len(nll) == context:
            bins = nll[: 16 * width].view(16, width).mean(1)
            right.plot([(i + 0.5) * width for i in range(16)], bins, "o-", markersize=4, label=f"theta {show(theta)}")
    right.set(xlabel="position (tokens)", ylabel=f"NLL, mean of {width:,} tokens", ylim=(0, None))
    right.set_title("How far it reads")
    right.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write(path, png.getvalue())
    print(f"drawn: {path}")


@torch.no_grad()
def main(config):
    tokens, context = config.tokens, config.context
    if tokens < GLANCE or context < tokens:
        reject(f"--tokens={tokens} --context={context}: give {GLANCE} tokens or more, and no context below that")
    torch.set_float32_matmul_precision("medium")  # faster on some CPUs; a few then multiply in bfloat16
    release = find_release(config.official)
    print(describe(release))

    tensors = load_state_dict(release)
    shapes = read_shapes(release, tensors)
    sources = public_sources(release, shapes)
    claimed = [said for said in sources.values() if said]
    dims = head_dims(shapes, [said["head_dim"] for said in claimed])
    network = Network(head_dim=64 if 64 in dims else dims[0])
    check_tensors(release, tensors, model_config(shapes, network, 1))
    findings = from_shapes(shapes)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"\n1. Names and shapes: {len(tensors)} tensors, {count:,} values, no bias, no head but embed_tokens\n")
    print(parameter_table(model_config(shapes, network, 1)))

    print(f"\n2. Behaviour: {release.title} reads {context:,} tokens of Python {PYTHON}'s own documentation")
    rivals = {
        "rope_layout": ("half-split", "interleaved"),
        "head_dim": dims,
        "kv_grouping": ("repeated", "tiled"),
        "gate": ("gate_proj", "up_proj"),
        "hidden_act": tuple(ACTIVATIONS),
        "norm_order": ("as named", "swapped"),
        "rope_theta": sorted({*THETAS, *(said["rope_theta"] for said in claimed)}),
        "rms_norm_eps": sorted({*EPSILONS, *(said["rms_norm_eps"] for said in claimed)}),
    }
    chance, reads = log(shapes.vocab_size), shapes.vocab_size >= VOCAB_SIZE
    if reads:
        tensors = {name: w.float() for name, w in tensors.items()}
        reader = Reader(shapes, tensors, text_ids(config))
        reader.nll(network, context)  # the search's start, in one go
        # Beyond the context that a network was trained on, a larger theta reads better, true or not.
        far = max(tokens, min(context, max(said["max_position_embeddings"] for said in claimed)))
        network, differences = search(reader, network, rivals, tokens, far)
        nll = reader.nll(network, context).mean().item()
        print(f"the network found reads at {nll:.4f} nats per token; chance is {chance:.4f}")
        reads = nll < chance - 1
    if reads:
        reach, limit = read_onward(reader, network, tokens, context)
        head = findings["tie_word_embeddings"]
        findings["tie_word_embeddings"] = head._replace(evidence=f"{head.evidence}, with which it reads")
    else:
        print("these weights do not read: behaviour settles nothing, and the sources are taken at their word")
        differences = {
            name: {value: Difference(0.0, 0.0, 0) for value in values if value != getattr(network, name)}
            for name, values in rivals.items()
        }
        reach, limit = 1, None
    findings |= from_behaviour(shapes, network, differences, sources)
    findings["max_position_embeddings"] = from_reading_on(reach, limit, sources)

    out_dir, proven = Path(config.out_dir), None
    if shapes == SHAPES_135M:
        proven = prove(findings, sources, out_dir / "config.json")
    print_table(findings, sources)
    wrong = conflicts(findings, sources, differences)
    for lines in wrong.values():
        print(*lines, sep="\n")
    own = next(iter(sources))
    print(f"\nthe release's own {own} {'contradicts' if own in wrong else 'agrees with'} the evidence")
    if config.plot and reads:
        draw(reader, network, sources, tokens, context, out_dir / "discover.png")
    sys.exit(1 if own in wrong or (proven is False and release.asked in ("base", "wheel")) else 0)


if __name__ == "__main__":
    main(configure(DiscoverConfig))
