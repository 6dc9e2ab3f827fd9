"""
Find the architecture in the official weights: every number, with the evidence for it.

    python discover.py                              the base release, or the wheel's weights: one to three minutes
    python discover.py --context=8192 --plot=True   read as far as the release can, and draw out/discover.png
    python discover.py --init_from=my/folder        other weights: 360M, 1.7B, a folder, a .gguf, a checkpoint

1. Names and shapes tell most of it. config.json is not trusted. Its claims are compared with the findings at the end.
2. Behaviour tells the rest. The same weights read the same text under rival hypotheses, each with one change, and
   the true architecture has the lowest NLL. Differences in NLL are paired, token by token. Neighbouring tokens are not
   independent, so the standard error counts 32 tokens in a row as one observation. It covers the choice of text, but
   not the weights: training in bfloat16 moves the mean NLL by about 0.001 nats. So a rival is ruled out only if it is
   worse by two standard errors and also by 0.001 nats. If several values remain, the evidence cannot tell them apart,
   and the first public source that names one of them decides.
3. Proof: the 135M's config.json, written from the findings, has the sha256 of the official file.

The exit code is 1 if the evidence contradicts the release's own config, or if the proof fails for base or wheel.
"""

import hashlib
import json
import pydoc_data.topics
import sys
from dataclasses import asdict, dataclass
from math import log, sqrt
from pathlib import Path
from typing import Literal, NamedTuple
from configurator import configure, reject

import torch
import torch.nn.functional as F

from lib.errors import one_line_errors, usable
from lib.files import written_whole
from lib.official import SHA256, wheel_gguf
from lib.oracle import ACTIVATIONS, build_variant
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture
from lib.tokenizer import VOCAB_SIZE, encode, load_tokenizer
from lib.weights import config_from_json, config_to_json, expected_shapes, find_weights, without_head
from model import PRESETS, ModelConfig, parameter_table


@dataclass(frozen=True)
class DiscoverConfig:
    """Find the architecture from the weights, and compare every public source's claims with it."""

    init_from: str = "base"  # the weights: base, instruct, 360M, ..., wheel, org/name, a folder, a .gguf, a checkpoint
    tokenizer: Literal["", "base"] = ""  # base: SmolLM2's own, in place of the one beside the weights
    context: int = 4_096  # how far to read; 8192 tells theta 50,000 from 100,000; the release fails past 10,240
    plot: bool = False  # draw NLL by theta and by position to out_dir/discover.png
    out_dir: str = "out"  # folder for config.json and discover.png


# The model_config in text/pretraining/smollm2/config_smollm2_135M.yaml of github.com/huggingface/smollm
TRAINING_YAML = dict(
    bos_token_id=0, eos_token_id=0, hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664,
    intermediate_size=1536, is_llama_config=True, max_position_embeddings=2048, num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False,
    rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=True, use_cache=True, vocab_size=49152,
)  # fmt: skip
# Fields of base's config.json that are not in the YAML, and that no weight can tell
FROM_TRANSFORMERS = dict(attention_dropout=0.0, torch_dtype="bfloat16", transformers_version="4.40.1")
PYTHON = sys.version.split()[0]
CONFIG_SHA256 = SHA256["HuggingFaceTB/SmolLM2-135M"]["config.json"]

TOKENS = 2_048  # length of the text on which rivals are compared
GLANCE = 256  # tokens: enough to rule out a rival that cannot read at all
BLOCK = 32  # tokens in a row that count as one observation
FLOOR = 0.001  # nats per token: a smaller difference is no evidence
LOSS = 0.1  # nats per token: reading beyond the context costs at least this much
BEYOND = 1.5  # a network reads a little past its training context (measured: 10,240 for 8,192), but never this far
THETAS = (1e3, 1e4, 3e4, 5e4, 1e5, 2e5, 5e5, 1e6)
EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3)


# ---------------------------------------------------------------------------------------------
# 1. Names and shapes


class Shapes(NamedTuple):
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    q_width: int  # query heads x head_dim; the shapes do not tell the two factors
    kv_width: int  # key/value heads x head_dim


def read_shapes(tensor_shapes, path):
    """Return the Shapes in {name: shape}. End the program with one line if it is not a Llama."""
    with usable(path, "name the weights of a Llama"):
        return Shapes(
            *tensor_shapes["model.embed_tokens.weight"],
            len({name.split(".")[2] for name in tensor_shapes if name.startswith("model.layers.")}),
            tensor_shapes["model.layers.0.mlp.gate_proj.weight"][0],
            tensor_shapes["model.layers.0.self_attn.q_proj.weight"][0],
            tensor_shapes["model.layers.0.self_attn.k_proj.weight"][0],
        )


def find_head_dims(shapes, claimed):
    """Return the head dimensions that divide both widths: multiples of 32, and those that a source claims."""
    Q, K = shapes.q_width, shapes.kv_width
    fitting = [D for D in sorted({*range(32, 257, 32), *claimed}) if D > 0 and D % 2 == Q % D == K % D == Q % K == 0]
    return fitting or sys.exit(f"error: no head_dim fits a q_proj and a k_proj {Q} and {K} wide")


# ---------------------------------------------------------------------------------------------
# 2. Behaviour


class Hypothesis(NamedTuple):
    """What shapes do not show. The search starts from the defaults, which are model.py's, and tests each of them."""

    rope_layout: str = "half-split"  # the strings: see lib/oracle.py's build_variant
    head_dim: int = 64
    kv_grouping: str = "repeated"
    gate: str = "gate_proj"
    hidden_act: str = "silu"
    norm_order: str = "as named"
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5


class Reader:
    """Measure the NLL of one text with one set of weights, under any Hypothesis. Remember what was measured."""

    def __init__(self, shapes, tensors, ids):
        self.shapes, self.tensors, self.ids = shapes, tensors, ids
        self.known = {}  # Hypothesis: NLL of the first tokens

    def nll(self, hypothesis, n):
        """Return the NLL in nats of each of the first n tokens, given all tokens before it: (n,)."""
        if len(self.known.get(hypothesis, ())) < n:
            self.known[hypothesis] = self.read(hypothesis, 0, n)
        return self.known[hypothesis][:n]

    def read(self, hypothesis, start, stop):
        """Return the NLL of each token from start to stop, given only the tokens from start on: (stop - start,)."""
        config = config_under(hypothesis, self.shapes, stop - start)
        variant = {name: value for name, value in hypothesis._asdict().items() if not hasattr(config, name)}
        model = build_variant(config, self.tensors, **variant)  # all rivals share these weights
        x = model.hidden(self.ids[None, start:stop])[0]  # (T, C)
        chunks = zip(x.split(512), self.ids[start + 1 : stop + 1].split(512), strict=True)  # 100 MB of logits each
        return torch.cat([F.cross_entropy(model.head(h), t, reduction="none") for h, t in chunks])


def config_under(hypothesis, shapes, length):
    """Return the ModelConfig of a Hypothesis, with a context of `length` tokens."""
    sizes, D = shapes._asdict(), hypothesis.head_dim
    heads = dict(num_attention_heads=sizes.pop("q_width") // D, num_key_value_heads=sizes.pop("kv_width") // D)
    numbers = dict(head_dim=D, rope_theta=hypothesis.rope_theta, rms_norm_eps=hypothesis.rms_norm_eps)
    return ModelConfig(**sizes, **heads, **numbers, max_position_embeddings=length)


class Difference(NamedTuple):
    """The difference in NLL of two readings of the same tokens."""

    mean: float
    error: float  # standard error of the mean
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


def compare(nll, other):
    """Return the Difference nll - other, token by token."""
    d = nll - other
    blocks = d[: len(d) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
    return Difference(d.mean().item(), blocks.std().item() / sqrt(len(blocks)), len(d))


def search(reader, hypothesis, rivals, tokens, far):
    """
    Compare `hypothesis` with every rival, one question at a time. If a rival is better, adopt it; repeat until none is.
    rivals: {question, a field of Hypothesis: its values}. Returns (hypothesis, {question: {rival: Difference}}).
    """
    print(f"\n{'question':<14}{'rival':>12}{'tokens':>8}{'NLL':>9}{'above found':>13}{'error':>8}{'ratio':>7}")
    compared_with, differences = None, {}
    while compared_with != hypothesis:
        compared_with = hypothesis
        for question, values in rivals.items():
            # A short text often suffices to rule a rival out, or to show no difference. Thetas need a long one.
            lengths = (tokens, far) if question == "rope_theta" else (GLANCE, tokens)
            differences[question] = {}
            for value in values:
                if value == getattr(hypothesis, question):
                    continue
                rival = hypothesis._replace(**{question: value})
                for n in lengths:
                    difference = compare(reader.nll(rival, n), reader.nll(hypothesis, n))
                    if difference.worse or abs(difference.mean) + 2 * difference.error < FLOOR:
                        break
                verdict = "ruled out" if difference.worse else "better" if difference.better else "not told apart"
                title = question * (not differences[question])
                nll = reader.nll(rival, n).mean()
                print(f"{title:<14}{show(value):>12}{n:>8,}{nll:>9.4f} {difference.row()}  {verdict}", flush=True)
                differences[question][value] = difference
            better = {value: d.mean for value, d in differences[question].items() if d.better}
            if better:
                hypothesis = hypothesis._replace(**{question: min(better, key=better.get)})
                print(f"{question} is now {show(getattr(hypothesis, question))}; every question is asked again")
    return hypothesis, differences


def read_onward(reader, hypothesis, tokens, context):
    """
    Find how far the network reads. Each stretch of text after `tokens` is read twice: given all the text before it,
    and given only the last tokens/2 to tokens of it. Returns (where the last stretch without a loss ends, where the
    first stretch with a loss ends, or None).
    """
    step = tokens // 2
    print(f"\n{'positions':<17}{'NLL':>9}{'above that given only':>23} {step:,} to {tokens:,} tokens")
    for start in range(tokens, context - step + 1, step):
        stop = start + step
        nll = reader.nll(hypothesis, context)[start:stop]
        difference = compare(nll, reader.read(hypothesis, start - step, stop)[step:])
        lost = difference.worse and difference.mean > LOSS
        verdict = "loss" if lost else "more context helps" if difference.better else "no loss"
        print(f"{start:>6,} to {stop:>6,} {nll.mean():>9.4f} {difference.row()}  {verdict}", flush=True)
        if lost:
            return start, stop
    return context, None


# ---------------------------------------------------------------------------------------------
# 3. The findings, and the claims of public sources


def public_sources(source, is_135m):
    """Return {source: its claims, or None if it has none here}. The weights' own source comes first."""
    names = ("GGUF header", "config.json") if source.is_gguf else ("config.json", "GGUF header")
    sources = {names[0]: claims(source.config), names[1]: None, "training YAML": None}
    if is_135m:
        sources["training YAML"] = claims(config_from_json(TRAINING_YAML))
        if not source.is_gguf and wheel_gguf():
            sources["GGUF header"] = claims(find_weights("wheel").config)
    return sources


def claims(config):
    """Return {parameter: value} according to a ModelConfig, and what model.py does whatever its settings."""
    return Hypothesis()._asdict() | asdict(config) | dict(attention_bias=False, tie_word_embeddings=True)


class Finding(NamedTuple):
    """A row of the closing table."""

    value: object
    remaining: object  # the values that the evidence leaves: a tuple or a range
    evidence: str
    decided_by: str = ""  # the source that chose among them


def decide(name, value, remaining, evidence, sources):
    """Return the Finding `value`; but if several values remain and a source names one of them, that one."""
    for source, claim in sources.items():
        if len(remaining) > 1 and claim and claim[name] in remaining:
            return Finding(claim[name], remaining, evidence, source)
    return Finding(value, remaining, evidence)


def from_shapes(shapes):
    """Return {parameter: Finding} from names and shapes."""
    V, C, layers, intermediate, *_ = shapes
    evidence = {
        "vocab_size": (V, f"embed_tokens [{V}, {C}]"),
        "hidden_size": (C, f"embed_tokens [{V}, {C}]"),
        "num_hidden_layers": (layers, f"model.layers.0 to {layers - 1}"),
        "intermediate_size": (intermediate, f"gate_proj [{intermediate}, {C}]"),
        "attention_bias": (False, "no tensor is named bias"),
        "tie_word_embeddings": (True, "no other head than embed_tokens"),
    }
    return {name: Finding(value, (value,), reason) for name, (value, reason) in evidence.items()}


def from_behaviour(shapes, hypothesis, differences, sources):
    """Return {parameter: Finding} from the search's result."""
    findings = {}
    for name, rivals in differences.items():
        value, out = getattr(hypothesis, name), {rival: d for rival, d in rivals.items() if d.worse}
        remaining = (value, *(rival for rival in rivals if rival not in out))
        nearest = min(out, key=lambda rival: out[rival].mean, default=None)
        evidence = f"{show(nearest)}: {out[nearest]}" if out else "not told apart"
        findings[name] = decide(name, value, remaining, evidence, sources)
        if name == "head_dim":
            Q, K, D = shapes.q_width, shapes.kv_width, findings[name]
            for heads, part, width in (("num_attention_heads", "q_proj", Q), ("num_key_value_heads", "k_proj", K)):
                evidence = f"{part} [{width}, {shapes.hidden_size}] / head_dim"
                findings[heads] = Finding(width // D.value, tuple(width // d for d in D.remaining), evidence)
    return findings


def from_reading_on(reach, limit, sources):
    """Return the Finding of the context, from what read_onward returns."""
    evidence = f"reads {reach:,} tokens without loss" + (f", but not {limit:,}" if limit else "")
    return decide("max_position_embeddings", reach, range(int(reach / BEYOND), limit or sys.maxsize), evidence, sources)


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
    print(f"\n{'parameter':<24}{'value':>11}{titles}   evidence (the nearest rival that is ruled out)")
    for name, finding in findings.items():
        claimed = [sources[title] and sources[title][name] for title in columns]
        cells = [f"{show(claim):>12}" + " *"[claim is not None and claim not in finding.remaining] for claim in claimed]
        print(f"{name:<24}{show(finding.value):>11}", *cells, f" {finding.evidence}")
    print()
    for name, finding in findings.items():
        if finding.decided_by:
            print(f"{name}: the evidence leaves {show(finding.remaining)}; the {finding.decided_by} decides")


def list_conflicts(findings, sources, differences):
    """Return {source: [a line for each of its claims that the evidence rules out]}, without sources that have none."""
    lines = {}
    for source, claim in sources.items():
        for name, finding in findings.items():
            if claim and claim[name] not in finding.remaining:
                margin = differences.get(name, {}).get(claim[name])
                reason = f"under {show(claim[name])}, {margin}" if margin else finding.evidence
                line = f"* {name}: the {source} says {show(claim[name])}, the weights {show(finding.value)}: {reason}"
                lines.setdefault(source, []).append(line)
    return lines


def prove(findings, sources, path):
    """Write base's config.json from the findings, and print its sources. Return True if it is the official file."""
    values = {name: finding.value for name, finding in findings.items()}
    config = ModelConfig(**{name: values[name] for name in asdict(ModelConfig()) if name in values})
    evidence = findings | {"rope_interleaved": findings["rope_layout"]}
    from_yaml = {name: value for name, value in TRAINING_YAML.items() if name not in evidence}
    fields = config_to_json(config, **from_yaml, **FROM_TRANSFORMERS)
    fields |= {name: values[name] for name in ("attention_bias", "hidden_act", "tie_word_embeddings")}
    fields |= {"rope_interleaved": values["rope_layout"] == "interleaved", "rope_theta": round(config.rope_theta)}
    del fields["head_dim"]  # which the file does not have
    fields = dict(sorted(fields.items()))
    content = (json.dumps(fields, indent=2) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(content)
    decided = {name: evidence[name].decided_by for name in fields if name in evidence}
    others = [name for name in fields if name not in evidence | from_yaml]
    print("\n3. Proof: the base release's config.json, written from\n")
    print("evidence alone      ", ", ".join(name for name in decided if not decided[name]))
    print("evidence and source ", ", ".join(name for name in decided if decided[name]))
    print("taken as known      ", f"{', '.join(from_yaml)}: from the training YAML")
    print("                    ", f"{', '.join(others)}: as transformers writes them")
    digest = hashlib.sha256(content).hexdigest()
    same = digest == CONFIG_SHA256
    print(f"\n{path}: {len(content)} bytes, sha256 {digest},")
    print("which is the official file's" if same else f"but the official file's is {CONFIG_SHA256}")
    if same and sources["config.json"] is None:  # the hash proves what the official file says
        sources["config.json"] = claims(config_from_json(fields))
    return same


def draw(reader, hypothesis, sources, tokens, context, path):
    """Plot NLL by theta and NLL by position."""
    figure, (left, right) = new_picture(panels=2)
    claimed = {source: claim["rope_theta"] for source, claim in sources.items() if claim}
    readings = {theta: reader.nll(hypothesis._replace(rope_theta=theta), context) for theta in claimed.values()}
    for rival, nll in reader.known.items():
        if rival == hypothesis._replace(rope_theta=rival.rope_theta):
            readings[rival.rope_theta] = nll
    for n, style, colour in ((tokens, "o-", BLUE), (context, "s--", ORANGE)):
        long_enough = {theta: nll[:n] for theta, nll in sorted(readings.items()) if len(nll) >= n}
        curve = {theta: compare(nll, long_enough[hypothesis.rope_theta]) for theta, nll in long_enough.items()}
        means, errors = [d.mean for d in curve.values()], [2 * d.error for d in curve.values()]
        left.errorbar([*curve], means, errors, fmt=style, color=colour, capsize=3, label=f"on the first {n:,} tokens")
    for theta in set(claimed.values()):
        names = "\n".join(source for source in claimed if claimed[source] == theta)
        left.axvline(theta, color=GREY, linestyle=":")
        left.text(theta, 0.98, names, transform=left.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    left.set_xscale("log")
    left.set_yscale("symlog", linthresh=0.01)
    left.set_ylim(-0.02, 300)
    ticks = [-0.01, 0, 0.01, 0.1, 1, 10]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.set(xlabel="rope_theta", ylabel=f"NLL above theta {show(hypothesis.rope_theta)}'s, ± 2 standard errors")
    left.set_title("Which theta has the lowest NLL")
    left.legend(loc="lower left")

    width = context // 16
    for theta, nll in sorted(readings.items()):
        if len(nll) == context:
            bins = nll[: 16 * width].view(16, width).mean(1)
            right.plot([(i + 0.5) * width for i in range(16)], bins, "o-", markersize=4, label=f"theta {show(theta)}")
    right.set(xlabel="position (tokens)", ylabel=f"NLL, mean of {width:,} tokens", ylim=(0, None))
    right.set_title("How far the network reads")
    right.legend()
    save_picture(figure, path)
    print(f"drawn: {path}")


@torch.no_grad()
@one_line_errors("close other programs, or give a shorter --context")
def main(config):
    context = config.context
    if context < TOKENS:
        reject(f"--context={context}: give at least {TOKENS}, the length on which rivals are compared")
    torch.set_float32_matmul_precision("medium")  # faster on some CPUs; a few then multiply in bfloat16
    source = find_weights(config.init_from, tokenizer=config.tokenizer)
    print(source.about)

    tensors = without_head(source.read(), source.path)
    tensor_shapes = {name: tuple(w.shape) for name, w in tensors.items()}
    shapes = read_shapes(tensor_shapes, source.path)
    is_135m = tensor_shapes == expected_shapes(PRESETS["135M"])
    sources = public_sources(source, is_135m)
    claimed = [claim for claim in sources.values() if claim]
    rivals = {  # {question, a field of Hypothesis: its values}, with those that a source claims
        "rope_layout": ("half-split", "interleaved"),
        "head_dim": find_head_dims(shapes, [claim["head_dim"] for claim in claimed]),
        "kv_grouping": ("repeated", "tiled"),
        "gate": ("gate_proj", "up_proj"),
        "hidden_act": tuple(ACTIVATIONS),
        "norm_order": ("as named", "swapped"),
        "rope_theta": sorted({*THETAS, *(claim["rope_theta"] for claim in claimed)}),
        "rms_norm_eps": sorted({*EPSILONS, *(claim["rms_norm_eps"] for claim in claimed)}),
    }
    hypothesis = Hypothesis(head_dim=64 if 64 in rivals["head_dim"] else rivals["head_dim"][0])
    initial = config_under(hypothesis, shapes, 1)
    expected = expected_shapes(initial)
    for name in expected | tensor_shapes:
        if tensor_shapes.get(name) != expected.get(name):
            stored, implied = (list(group.get(name, ())) or "missing" for group in (tensor_shapes, expected))
            sys.exit(f"error: {source.path}: {name} is {stored}, but by the other tensors it must be {implied}")
    findings = from_shapes(shapes)
    count = sum(w.numel() for w in tensors.values())
    print(f"\n1. Names and shapes: {len(tensors)} tensors, {count:,} values, no bias, no head but embed_tokens\n")
    print(parameter_table(initial))

    print(f"\n2. Behaviour: {source.title} reads {context:,} tokens of Python {PYTHON}'s own documentation")
    chance, reads = log(shapes.vocab_size), shapes.vocab_size >= VOCAB_SIZE
    if reads:
        tensors = {name: w.float() for name, w in tensors.items()}
        text = "\n\n".join(sorted(pydoc_data.topics.topics.values(), key=len, reverse=True))  # the longest are prose
        ids = encode(load_tokenizer(**source.tokenizer), text)
        if len(ids) <= context:
            reject(f"--context={context} is more than the text has: {len(ids):,} tokens")
        reader = Reader(shapes, tensors, torch.tensor(ids[: context + 1]))
        reader.nll(hypothesis, context)  # read once at full length; shorter readings are its beginnings
        # Beyond the context of training, a larger theta has a lower NLL, whether it is the true one or not.
        far = max(TOKENS, min(context, max(claim["max_position_embeddings"] for claim in claimed)))
        hypothesis, differences = search(reader, hypothesis, rivals, TOKENS, far)
        nll = reader.nll(hypothesis, context).mean().item()
        print(f"the mean NLL of the network found is {nll:.4f} nats per token; chance is {chance:.4f}")
        reads = nll < chance - 1
    if reads:
        reach, limit = read_onward(reader, hypothesis, TOKENS, context)
        head = findings["tie_word_embeddings"]
        findings["tie_word_embeddings"] = head._replace(evidence=f"{head.evidence}, and it predicts the text")
    else:
        print(f"these weights cannot read the text: the sources are believed{', nothing is drawn' * config.plot}")
        differences = {
            name: {value: Difference(0.0, 0.0, 0) for value in values if value != getattr(hypothesis, name)}
            for name, values in rivals.items()
        }
        reach, limit = 1, None
    findings |= from_behaviour(shapes, hypothesis, differences, sources)
    findings["max_position_embeddings"] = from_reading_on(reach, limit, sources)

    out_dir, proven = Path(config.out_dir), None
    if is_135m:
        proven = prove(findings, sources, out_dir / "config.json")
    print_table(findings, sources)
    conflicts = list_conflicts(findings, sources, differences)
    for lines in conflicts.values():
        print(*lines, sep="\n")
    own = next(iter(sources))
    print(f"\nthe release's own {own} {'contradicts' if own in conflicts else 'agrees with'} the evidence")
    if config.plot and reads:
        draw(reader, hypothesis, sources, TOKENS, context, out_dir / "discover.png")
    sys.exit(1 if own in conflicts or (proven is False and config.init_from in ("base", "wheel")) else 0)


if __name__ == "__main__":
    main(configure(DiscoverConfig))
