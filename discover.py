"""
Recover the architecture from only the official weights, with the evidence for every number.

    python discover.py                              base, or its fallback without the Hub: one to three minutes
    python discover.py --context=8192 --plot=True   read as far as the release can, and draw out/discover.png
    python discover.py --init_from=my/folder        other weights: 360M, 1.7B, a folder, a .gguf, a checkpoint

1. Names and shapes determine most of it. config.json is not trusted: its claims are checked against the findings.
2. Behavior determines the rest. The same weights read the same text under rival hypotheses, each with one change, and
   the true architecture has the lowest NLL. Differences are paired by token; 32 tokens in a row, which are not
   independent, count as one observation. A rival is ruled out if it is worse by two standard errors and by 0.001 nats,
   the effect of training in bfloat16. If several values remain, the first public source that names one decides.
3. Proof: the 135M's config.json, written from the findings, has the sha256 of the official file.

The exit code is 1 if the evidence contradicts the release's own config, or if the proof fails for base or wheel.
"""

import hashlib
import json
import pydoc_data.topics
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass
from math import log, sqrt
from pathlib import Path
from typing import Literal, NamedTuple
from configurator import configure, reject

import torch
import torch.nn.functional as F

from lib.errors import one_line_errors, usable
from lib.files import write_atomically
from lib.official import SHA256, wheel_gguf
from lib.oracle import ACTIVATIONS, build_variant
from lib.pictures import BLUE, GREY, ORANGE, PURPLE, new_picture, save_picture
from lib.tokenizer import VOCAB_SIZE, encode, load_tokenizer
from lib.weights import config_from_json, drop_tied_head, expected_shapes, find_weights
from model import PRESETS, ModelConfig, parameter_table


@dataclass(frozen=True)
class DiscoverConfig:
    """Recover the architecture from the weights, and check every public source's claims against it."""

    init_from: str = "base"  # the weights: base, instruct, 360M, ..., wheel, org/name, a folder, a .gguf, a checkpoint
    tokenizer: Literal["", "base"] = ""  # base: use SmolLM2's own tokenizer instead of the one next to the weights
    context: int = 4_096  # tokens to read; 8192 separates theta 50,000 from 100,000; the release fails past 10,240
    plot: bool = False  # draw the NLL by theta and by position to out_dir/discover.png
    out_dir: str = "out"  # folder for config.json and discover.png


# The model_config in text/pretraining/smollm2/config_smollm2_135M.yaml of github.com/huggingface/smollm
TRAINING_YAML = dict(
    bos_token_id=0, eos_token_id=0, hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664,
    intermediate_size=1536, is_llama_config=True, max_position_embeddings=2048, num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False,
    rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=True, use_cache=True, vocab_size=49152,
)  # fmt: skip
# Fields of base's config.json that are not in the YAML and that the weights cannot show
FROM_TRANSFORMERS = dict(attention_dropout=0.0, torch_dtype="bfloat16", transformers_version="4.40.1")
CONFIG_SHA256 = SHA256["HuggingFaceTB/SmolLM2-135M"]["config.json"]

FULL_TOKENS = 2_048  # length of the text on which rivals are compared
SHORT_TOKENS = 256  # enough to rule out a rival that cannot read at all
TOKENS_PER_OBSERVATION = 32  # neighboring tokens that count as one observation
MIN_NATS = 0.001  # per token: a smaller difference is no evidence
BREAKDOWN_NATS = 0.1  # per token: reading beyond the context costs at least this much
MAX_EXTRAPOLATION = 1.5  # a model reads past its training context, 10,240 for 8,192 as measured, but never this far
THETAS = (1e3, 1e4, 3e4, 5e4, 1e5, 2e5, 5e5, 1e6)
EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3)


# ---- 1. Names and shapes
# q_width: query heads x head_dim; kv_width: key/value heads x head_dim. Shapes cannot separate the two factors.
Shapes = namedtuple("Shapes", "vocab_size hidden_size num_hidden_layers intermediate_size q_width kv_width")


def read_shapes(tensor_shapes, path):
    """Return the Shapes in {name: shape}. Exit if they are not a Llama's."""
    with usable(path, "use the weights of a Llama"):
        return Shapes(
            *tensor_shapes["model.embed_tokens.weight"],
            len({name.split(".")[2] for name in tensor_shapes if name.startswith("model.layers.")}),
            tensor_shapes["model.layers.0.mlp.gate_proj.weight"][0],
            tensor_shapes["model.layers.0.self_attn.q_proj.weight"][0],
            tensor_shapes["model.layers.0.self_attn.k_proj.weight"][0],
        )


def check_tensors(tensor_shapes, config, path):
    """Exit if a tensor is missing, unknown, or shaped differently than the others imply."""
    expected = expected_shapes(config)
    for name in expected | tensor_shapes:
        if tensor_shapes.get(name) != expected.get(name):
            stored, implied = (list(shapes.get(name, ())) or "missing" for shapes in (tensor_shapes, expected))
            sys.exit(f"error: {path}: {name} is {stored}, but by the other tensors it must be {implied}")


def find_head_dims(shapes, claimed):
    """Return the head dimensions that divide both widths: multiples of 32, and those that a source claims."""
    Q, K = shapes.q_width, shapes.kv_width
    fitting = [D for D in sorted({*range(32, 257, 32), *claimed}) if D > 0 and D % 2 == Q % D == K % D == Q % K == 0]
    return fitting or sys.exit(f"error: no head_dim fits a q_proj and a k_proj {Q} and {K} wide")


# ---- 2. Behavior
class Hypothesis(NamedTuple):
    """Settings that shapes do not show. The search starts from the defaults, which are model.py's, and tests each."""

    rope_layout: str = "half-split"  # the strings: see lib/oracle.py's build_variant
    head_dim: int = 64
    kv_grouping: str = "repeated"
    gate: str = "gate_proj"
    hidden_act: str = "silu"
    norm_order: str = "as named"
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5


def list_rivals(shapes, claims):
    """Return {question, a field of Hypothesis: the values to compare}, including those that a source claims."""
    return {
        "rope_layout": ("half-split", "interleaved"),
        "head_dim": find_head_dims(shapes, [claim["head_dim"] for claim in claims]),
        "kv_grouping": ("repeated", "tiled"),
        "gate": ("gate_proj", "up_proj"),
        "hidden_act": tuple(ACTIVATIONS),
        "norm_order": ("as named", "swapped"),
        "rope_theta": sorted({*THETAS, *(claim["rope_theta"] for claim in claims)}),
        "rms_norm_eps": sorted({*EPSILONS, *(claim["rms_norm_eps"] for claim in claims)}),
    }


class Reader:
    """Measure the NLL of one text with one set of weights, under any Hypothesis. Each measurement is made once."""

    def __init__(self, shapes, tensors, ids):
        self.shapes, self.tensors, self.ids = shapes, tensors, ids
        self.measured = {}  # Hypothesis: NLL of the first tokens

    def measure(self, hypothesis, n):
        """Return the NLL in nats of each of the first n tokens, given all tokens before it: (n,)."""
        if len(self.measured.get(hypothesis, ())) < n:
            self.measured[hypothesis] = self.read(hypothesis, 0, n)
        return self.measured[hypothesis][:n]

    def read(self, hypothesis, start, stop):
        """Return the NLL of each token from start to stop, given only the tokens from start on: (stop - start,)."""
        config = make_config(hypothesis, self.shapes, stop - start)
        variant = {name: value for name, value in hypothesis._asdict().items() if not hasattr(config, name)}
        model = build_variant(config, self.tensors, **variant)  # all rivals share these weights
        x = model.hidden(self.ids[None, start:stop])[0]  # (T, C)
        chunks = zip(x.split(512), self.ids[start + 1 : stop + 1].split(512), strict=True)  # 100 MB of logits each
        return torch.cat([F.cross_entropy(model.head(h), t, reduction="none") for h, t in chunks])


def make_config(hypothesis, shapes, length):
    """Return the ModelConfig of a Hypothesis, with a context of `length` tokens."""
    sizes, D = shapes._asdict(), hypothesis.head_dim
    heads = dict(num_attention_heads=sizes.pop("q_width") // D, num_key_value_heads=sizes.pop("kv_width") // D)
    numbers = dict(head_dim=D, rope_theta=hypothesis.rope_theta, rms_norm_eps=hypothesis.rms_norm_eps)
    return ModelConfig(**sizes, **heads, **numbers, max_position_embeddings=length)


class Difference(NamedTuple):
    """Difference in NLL between two readings of the same tokens."""

    mean: float
    error: float  # standard error of the mean

    @property
    def verdict(self):
        if abs(self.mean) > max(2 * self.error, MIN_NATS):
            return "ruled out" if self.mean > 0 else "better"
        return "inconclusive"

    @property
    def ratio(self):
        return abs(self.mean) / self.error if self.error else 0.0

    def __str__(self):
        return f"NLL {self.mean:+.2g} ± {self.error:.1g} ({self.ratio:.1f} standard errors)"

    def format_row(self):
        return f"{self.mean:>+12.3g}{self.error:>10.2g}{self.ratio:>7.1f}"


def compare(nll, other_nll):
    """Return the Difference nll - other_nll, token by token."""
    n = TOKENS_PER_OBSERVATION
    difference = nll - other_nll
    observations = difference[: len(difference) // n * n].view(-1, n).mean(1)
    return Difference(difference.mean().item(), observations.std().item() / sqrt(len(observations)))


def search(reader, hypothesis, rivals, tokens, theta_tokens):
    """
    Compare `hypothesis` with every rival, one question at a time. If a rival is better, adopt it; repeat until none is.
    rivals: {question, a field of Hypothesis: its values}. Return (hypothesis, {question: {rival: Difference}}).
    """
    print(f"\n{'question':<14}{'rival':>12}{'tokens':>8}{'NLL':>9}{'difference':>12}{'error':>10}{'ratio':>7}")
    compared_with = None
    differences = {}
    while compared_with != hypothesis:
        compared_with = hypothesis
        for question, values in rivals.items():
            # A short text often suffices to rule a rival out, or to show no difference. Thetas need a long one.
            lengths = (tokens, theta_tokens) if question == "rope_theta" else (SHORT_TOKENS, tokens)
            differences[question] = {}
            for value in values:
                rival = hypothesis._replace(**{question: value})
                if rival == hypothesis:
                    continue
                for n in lengths:
                    difference = compare(reader.measure(rival, n), reader.measure(hypothesis, n))
                    if difference.verdict == "ruled out" or abs(difference.mean) + 2 * difference.error < MIN_NATS:
                        break
                row = f"{reader.measure(rival, n).mean():>9.4f}{difference.format_row()}  {difference.verdict}"
                title = "" if differences[question] else question
                print(f"{title:<14}{format_value(value):>12}{n:>8,}{row}", flush=True)
                differences[question][value] = difference
            if better := {value: d.mean for value, d in differences[question].items() if d.verdict == "better"}:
                best = min(better, key=better.get)
                hypothesis = hypothesis._replace(**{question: best})
                print(f"{question} is now {format_value(best)}; every question is tested again")
    return hypothesis, differences


def find_reach(reader, hypothesis, tokens, context):
    """
    Read each stretch of text after `tokens` once given all the text before it, and once given only the last tokens/2 to
    tokens of it. Return (number of tokens that the model reads without loss, end of the first loss or None).
    """
    step = tokens // 2
    print(f"\n{'positions':<17}{'NLL':>9}{'difference':>12}{'error':>10}{'ratio':>7}  vs {step:,} to {tokens:,} tokens")
    for start in range(tokens, context - step + 1, step):
        stop = start + step
        nll = reader.measure(hypothesis, context)[start:stop]
        difference = compare(nll, reader.read(hypothesis, start - step, stop)[step:])
        verdict = "more context helps" if difference.verdict == "better" else "no loss"
        if difference.verdict == "ruled out" and difference.mean > BREAKDOWN_NATS:
            verdict = "loss"
        print(f"{start:>6,} to {stop:>6,} {nll.mean():>9.4f}{difference.format_row()}  {verdict}", flush=True)
        if verdict == "loss":
            return start, stop
    return context, None


# ---- 3. The findings, and the claims of public sources
def collect_sources(source, is_135m):
    """Return {source: its claims, or None if they are not available}. The weights' own source comes first."""
    own, other = ("GGUF header", "config.json") if source.is_gguf else ("config.json", "GGUF header")
    sources = {own: read_claims(source.config), other: None}
    sources["training YAML"] = read_claims(config_from_json(TRAINING_YAML)) if is_135m else None
    if is_135m and other == "GGUF header" and wheel_gguf():
        sources[other] = read_claims(find_weights("wheel").config)
    return sources


def read_claims(config):
    """Return {parameter: value} of a ModelConfig, with the choices that are fixed in model.py."""
    return Hypothesis()._asdict() | asdict(config) | dict(attention_bias=False, tie_word_embeddings=True)


# A row of the closing table. remaining: the values that the evidence leaves; decided_by: the source that chose one
Finding = namedtuple("Finding", "value remaining evidence decided_by", defaults=("",))


def decide(name, value, remaining, evidence, sources):
    """Return the Finding `value`; but if several values remain and a source names one of them, that one."""
    for source, claims in sources.items():
        if len(remaining) > 1 and claims and claims[name] in remaining:
            return Finding(claims[name], remaining, evidence, source)
    return Finding(value, remaining, evidence)


def conclude_from_shapes(shapes):
    """Return {parameter: Finding} from names and shapes."""
    V, C, layers, intermediate, *_ = shapes
    return {
        "vocab_size": Finding(V, (V,), f"embed_tokens [{V}, {C}]"),
        "hidden_size": Finding(C, (C,), f"embed_tokens [{V}, {C}]"),
        "num_hidden_layers": Finding(layers, (layers,), f"model.layers.0 to {layers - 1}"),
        "intermediate_size": Finding(intermediate, (intermediate,), f"gate_proj [{intermediate}, {C}]"),
        "attention_bias": Finding(False, (False,), "no tensor is named bias"),
        "tie_word_embeddings": Finding(True, (True,), "no head except embed_tokens"),
    }


def conclude_from_behavior(shapes, hypothesis, differences, sources):
    """Return {parameter: Finding} from the result of search."""
    findings = {}
    for name, rivals in differences.items():
        value = getattr(hypothesis, name)
        ruled_out = {rival: difference for rival, difference in rivals.items() if difference.verdict == "ruled out"}
        remaining = tuple(candidate for candidate in {value: None} | rivals if candidate not in ruled_out)
        nearest = min(ruled_out, key=lambda rival: ruled_out[rival].mean, default=None)
        evidence = f"{format_value(nearest)}: {ruled_out[nearest]}" if ruled_out else "inconclusive"
        findings[name] = decide(name, value, remaining, evidence, sources)
        if name == "head_dim":
            Q, K = shapes.q_width, shapes.kv_width
            for heads, part, width in (("num_attention_heads", "q_proj", Q), ("num_key_value_heads", "k_proj", K)):
                value, *remaining = (width // D for D in (findings[name].value, *findings[name].remaining))
                findings[heads] = Finding(value, tuple(remaining), f"{part} [{width}, {shapes.hidden_size}] / head_dim")
    return findings


def conclude_context(reach, limit, sources):
    """Return the Finding of the context, from the result of find_reach."""
    evidence = f"reads {reach:,} tokens without loss" + (f", but not {limit:,}" if limit else "")
    remaining = range(int(reach / MAX_EXTRAPOLATION), limit or sys.maxsize)
    return decide("max_position_embeddings", reach, remaining, evidence, sources)


def format_value(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1 else f"{value:g}"
    if isinstance(value, tuple):
        return " or ".join(map(format_value, value))
    if isinstance(value, range):
        return f"{value.start:,} " + (f"to {value.stop:,}" if value.stop < sys.maxsize else "or more")
    return "-" if value is None else str(value)


def print_table(findings, sources):
    columns = ("config.json", "training YAML", "GGUF header")
    titles = "".join(f"{title:>14}" for title in columns)
    print(f"\n{'parameter':<24}{'value':>11}{titles}   evidence (the nearest rival that is ruled out)")
    for name, finding in findings.items():
        claimed = [sources[title] and sources[title][name] for title in columns]
        marks = [" " if claim is None or claim in finding.remaining else "*" for claim in claimed]
        cells = "".join(f" {format_value(claim):>12}{mark}" for claim, mark in zip(claimed, marks, strict=True))
        print(f"{name:<24}{format_value(finding.value):>11}{cells}  {finding.evidence}")
    print()
    for name, finding in findings.items():
        if finding.decided_by:
            print(f"{name}: the evidence leaves {format_value(finding.remaining)}; the {finding.decided_by} decides")


def print_conflicts(findings, sources, differences):
    """Print which claims the evidence rules out. Return the sources that made them."""
    conflicts = []
    for source, claims in sources.items():
        wrong = {name: claims[name] for name in findings if claims and claims[name] not in findings[name].remaining}
        if wrong:
            conflicts.append(source)
            print(f"\nthe weights rule out the {source}'s {' and '.join(map(format_value, wrong.values()))}:")
        for name, claim in wrong.items():
            difference = differences.get(name, {}).get(claim)
            reason = f"with {format_value(claim)}, {difference}" if difference else findings[name].evidence
            print(f"* {name} is {format_value(findings[name].remaining)}, not {format_value(claim)}: {reason}")
    return conflicts


def prove(findings, sources, path):
    """Write base's config.json from the findings, and print its sources. Return True if it is the official file."""
    evidence = findings | {"rope_interleaved": findings["rope_layout"]}
    fields = FROM_TRANSFORMERS | dict(architectures=["LlamaForCausalLM"], model_type="llama") | TRAINING_YAML
    origins = dict.fromkeys(fields, "transformers") | dict.fromkeys(TRAINING_YAML, "training YAML")
    for name in evidence.keys() & {"attention_bias", *TRAINING_YAML}:
        fields[name] = evidence[name].value
        origins[name] = "evidence and source" if evidence[name].decided_by else "evidence only"
    fields["rope_theta"] = round(fields["rope_theta"])
    fields["rope_interleaved"] = fields["rope_interleaved"] == "interleaved"
    content = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(content)
    print("\n3. Proof: the base release's config.json, written from\n")
    for origin in ("evidence only", "evidence and source", "training YAML", "transformers"):
        print(f"{origin:<20} {', '.join(name for name in sorted(fields) if origins[name] == origin)}")
    digest = hashlib.sha256(content).hexdigest()
    proven = digest == CONFIG_SHA256
    print(f"\n{path}: {len(content)} bytes, sha256 {digest},")
    print("which is the official file's" if proven else f"but the official file's is {CONFIG_SHA256}")
    if proven and sources["config.json"] is None:  # so the official file makes the same claims
        sources["config.json"] = read_claims(config_from_json(fields))
    return proven


def draw(reader, hypothesis, differences, sources, tokens, context, path):
    """Plot NLL by theta and by position. Blue: the theta that was found; orange: ruled out; purple: inconclusive."""
    print(f"\ndrawing {path}: the claimed thetas read all {context:,} tokens", flush=True)
    best = hypothesis.rope_theta
    claimed = {source: claims["rope_theta"] for source, claims in sources.items() if claims}
    for theta in claimed.values():
        reader.measure(hypothesis._replace(rope_theta=theta), context)
    verdicts = {best: "found"} | {theta: difference.verdict for theta, difference in differences["rope_theta"].items()}
    readings = {theta: reader.measured[hypothesis._replace(rope_theta=theta)] for theta in sorted(verdicts)}
    colors = {theta: {"found": BLUE, "ruled out": ORANGE}.get(verdict, PURPLE) for theta, verdict in verdicts.items()}
    figure, (left, right) = new_picture(panels=2)

    points = {theta: compare(nll[:tokens], readings[best][:tokens]) for theta, nll in readings.items()}
    left.plot([*points], [point.mean for point in points.values()], color=GREY, linewidth=0.8)
    for theta, point in points.items():
        left.errorbar(theta, point.mean, 2 * point.error, fmt="o", color=colors[theta], markersize=7, capsize=4)
    for theta in set(claimed.values()):
        names = "\n".join(f"{source} " for source in claimed if claimed[source] == theta)
        left.axvline(theta, color=GREY, linestyle=":", zorder=0)
        left.text(theta, 0.98, names, transform=left.get_xaxis_transform(), ha="right", va="top", fontsize=9)
    left.set_yscale("symlog", linthresh=0.01)
    left.set_yticks([-0.01, 0, 0.01, 0.1, 1, 10], ["-0.01", "0", "0.01", "0.1", "1", "10"])
    wrong = [format_value(theta) for theta in sorted(set(claimed.values())) if verdicts[theta] == "ruled out"]
    title = f"The text rules out theta {' and '.join(wrong)}" if wrong else "NLL by theta"
    label = f"NLL above theta {format_value(best)}'s (nats, ± 2 s.e.)"
    left.set(xscale="log", xlabel=f"rope_theta, on {tokens:,} tokens", ylabel=label, ylim=(-0.02, 100), title=title)

    width = context // 16
    bins = {theta: nll[: 16 * width].view(16, -1).mean(1) for theta, nll in readings.items() if len(nll) >= context}
    title = "NLL by position"
    for theta, nll in bins.items():
        style = dict(linewidth=6, alpha=0.5) if theta == best else dict(marker="o", markersize=4, zorder=3)
        label = f"theta {format_value(theta)}, {verdicts[theta]}"
        right.plot([(i + 0.5) * width for i in range(16)], nll, color=colors[theta], label=label, **style)
        worse = nll > bins[best] + 1  # by more than one nat
        if worse.any():
            title = f"Theta {format_value(theta)} breaks down after {worse.int().argmax() * width:,} tokens"
    right.set(xlabel="position (tokens)", ylabel=f"NLL (nats, mean of {width:,} tokens)", title=title)
    right.legend()
    save_picture(figure, path)


@torch.no_grad()
@one_line_errors("close other programs, or pass a shorter --context")
def main(config):
    context = config.context
    if context < FULL_TOKENS:
        reject(f"--context={context} is too short: rivals are compared on {FULL_TOKENS} tokens, so pass at least that")
    torch.set_float32_matmul_precision("medium")  # faster on some CPUs; a few of them then multiply in bfloat16
    source = find_weights(config.init_from, tokenizer=config.tokenizer)
    print(source.about)
    tensors = drop_tied_head(source.read(), source.path)
    tensor_shapes = {name: tuple(w.shape) for name, w in tensors.items()}
    is_135m = tensor_shapes == expected_shapes(PRESETS["135M"])
    sources = collect_sources(source, is_135m)
    own_source = next(iter(sources))
    all_claims = [claims for claims in sources.values() if claims]

    shapes = read_shapes(tensor_shapes, source.path)
    rivals = list_rivals(shapes, all_claims)
    hypothesis = Hypothesis(head_dim=64 if 64 in rivals["head_dim"] else rivals["head_dim"][0])
    initial_config = make_config(hypothesis, shapes, 1)
    check_tensors(tensor_shapes, initial_config, source.path)
    findings = conclude_from_shapes(shapes)
    count = sum(w.numel() for w in tensors.values())
    print(f"\n1. Names and shapes: {len(tensors)} tensors, {count:,} values, no bias, no head except embed_tokens\n")
    print(parameter_table(initial_config))

    print(f"\n2. Behavior: {source.title} reads {context:,} tokens of Python {sys.version.split()[0]}'s documentation")
    can_read = shapes.vocab_size >= VOCAB_SIZE
    if can_read:
        text = "\n\n".join(sorted(pydoc_data.topics.topics.values(), key=len, reverse=True))  # the longest are prose
        ids = encode(load_tokenizer(**source.tokenizer), text)
        if len(ids) <= context:
            reject(f"--context={context} is longer than the text, {len(ids):,} tokens: pass a smaller one")
        reader = Reader(shapes, {n: w.float() for n, w in tensors.items()}, torch.tensor(ids[: context + 1]))
        reader.measure(hypothesis, context)  # read once at full length; shorter readings are its beginnings
        # Beyond the context of training, a larger theta has a lower NLL, whether it is the true one or not.
        theta_tokens = max(FULL_TOKENS, min(context, max(claims["max_position_embeddings"] for claims in all_claims)))
        hypothesis, differences = search(reader, hypothesis, rivals, FULL_TOKENS, theta_tokens)
        nll = reader.measure(hypothesis, context).mean().item()
        chance = log(shapes.vocab_size)
        print(f"the model found has a mean NLL of {nll:.4f} nats per token; chance is {chance:.4f}")
        can_read = nll < chance - 1
    if can_read:
        reach, limit = find_reach(reader, hypothesis, FULL_TOKENS, context)
        tied = findings["tie_word_embeddings"]
        findings["tie_word_embeddings"] = tied._replace(evidence=f"{tied.evidence}, and it predicts the text")
    else:
        scope = "reported, and nothing is drawn" if config.plot else "reported"
        print(f"these weights cannot predict the text, so only the sources' claims are {scope}")
        differences = {name: dict.fromkeys(values, Difference(0.0, 0.0)) for name, values in rivals.items()}
        reach, limit = 1, None
    findings |= conclude_from_behavior(shapes, hypothesis, differences, sources)
    findings["max_position_embeddings"] = conclude_context(reach, limit, sources)

    out_dir = Path(config.out_dir)
    proven = prove(findings, sources, out_dir / "config.json") if is_135m else None
    print_table(findings, sources)
    contradicts = own_source in print_conflicts(findings, sources, differences)
    print(f"\nthe release's own {own_source} {'contradicts' if contradicts else 'agrees with'} the evidence")
    if config.plot and can_read:
        draw(reader, hypothesis, differences, sources, FULL_TOKENS, context, out_dir / "discover.png")
    sys.exit(1 if contradicts or (proven is False and config.init_from in ("base", "wheel")) else 0)


if __name__ == "__main__":
    main(configure(DiscoverConfig))
