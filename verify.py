"""
Check that model.py is the released model: load the official weights and print one ✓ or ✗ for each comparison.

    python verify.py                                        compare model.py with transformers, on the official weights
    python verify.py --init_from=out/ckpt.pt                the same on other weights: a checkpoint, a folder, a .gguf
    python verify.py --init_from=copy.gguf --against=base   compare a copy of the weights with the release

Each row shows a measurement and its tolerance, or "skipped" and why. The exit code is 1 if a row says ✗. The negative
controls, five wrong models with the right shapes, must miss the tolerance by far: they show that the check can fail.
"""

import pydoc_data.topics
import sys
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, replace
from math import log, prod
from configurator import check_used, configure, reject

import gguf
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from lib.checkpoint import read_checkpoint
from lib.gguf import read_gguf_types
from lib.official import SHA256
from lib.oracle import build_oracle, build_variant
from lib.tokenizer import VOCAB_SIZE, encode, load_tokenizer
from lib.weights import build, expected_shapes, find_weights, load_model, unwrap
from model import KVCache


@dataclass(frozen=True)
class VerifyConfig:
    """Compare model.py with transformers, or a copy of the weights with the release. Exit code 0: no check failed."""

    init_from: str = "base"  # the weights: base, instruct, 360M, ..., wheel, org/name, a folder, a .gguf, a checkpoint
    base: str = ""  # weights that a LoRA adapter was trained on (default: the ones named in its config)
    against: str = ""  # check init_from as a copy of these weights; takes the same names
    tokens: int = 2_048  # tokens of text that the models read; every position is compared
    quick: bool = False  # read 128 tokens: seconds instead of a minute

    def __post_init__(self):
        check_used(self, not self.quick or self.tokens < 128, "with --quick", "tokens")


# The largest errors that a storage type may cause. value: relative to the largest value that shares its scale; hidden:
# relative, of hidden states; logits: absolute; argmax: smallest share of equal tokens; nll: relative, of the mean NLL.
# A value's error is half a step of its type. The other numbers were measured on SmolLM2-135M and rounded up generously.
Tolerance = namedtuple("Tolerance", "value hidden logits argmax nll")
BELOW_8_BITS = "Q6_K Q5_K Q4_K Q3_K Q5_1 Q5_0 Q4_1 Q4_0 IQ4_NL IQ4_XS MXFP4".split()
TOLERANCES = {
    "F32": Tolerance(2**-24, 1e-5, 5e-4, 1.0, 1e-5),
    "F16": Tolerance(2**-11, 5e-3, 0.5, 0.98, 1e-3),
    "BF16": Tolerance(2**-8, 3e-2, 3.0, 0.95, 1e-2),
    "Q8_0": Tolerance(1 / 200, 0.1, 10.0, 0.9, 3e-2),
    **dict.fromkeys(BELOW_8_BITS, Tolerance(4 / 5, 2.0, 100.0, 0.2, 1.5)),
}
EXACT = TOLERANCES["F32"]  # for two models with the same weights, both in fp32
MARGIN = 10  # a negative control must miss EXACT by this factor
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as in safetensors and GGUF
BASE_SHA256 = SHA256["HuggingFaceTB/SmolLM2-135M"]["model.safetensors"]

# The 135M's numbers, repeated on purpose: a wrong model.py or config.json must not be able to confirm itself
SHAPES_135M = dict(  # 9 query heads and 3 key/value heads of 64
    embed_tokens=(49_152, 576), q_proj=(576, 576), k_proj=(192, 576), v_proj=(192, 576), o_proj=(576, 576),
    gate_proj=(1_536, 576), up_proj=(1_536, 576), down_proj=(576, 1_536),
)  # fmt: skip
PROMPT = [22007, 6463, 314]
CONTINUATION = [260, 3075]  # greedy decoding with the base release

Row = namedtuple("Row", "result measured bound notes")  # result: ✓, ✗ or skipped


class Checklist:
    """Print each row as soon as it is known, and keep it in `rows`, {name: Row}."""

    def __init__(self):
        self.rows = {}

    def row(self, name, ok, measured, bound="", notes=()):
        """ok: True, False, or None if the row could not be measured; then `measured` says why."""
        result = {True: "✓", False: "✗", None: "skipped"}[ok]
        self.rows[name] = Row(result, measured, bound, list(notes))
        print(f"{result:<9}{name:<41} {measured:<29} {bound}".rstrip(), flush=True)
        for note in notes:
            print(f"{'':<11}{note}", flush=True)

    def within(self, name, error, tolerance, measured, notes=()):
        self.row(name, error <= tolerance, measured, f"within {tolerance:g}", notes)  # False if the error is NaN

    def compare(self, name, logits, reference, tolerance):
        error = (logits - reference).abs().max().item()
        self.within(name, error, tolerance, f"largest difference {error:.1e}" if error else "identical")

    def count(self, result):
        return sum(row.result == result for row in self.rows.values())


def read_types(source, tensors):
    """Return {name: storage type: F32, BF16, Q4_1, ...} of a source's tensors."""
    if source.is_gguf:
        return dict(zip(tensors, read_gguf_types(source.path), strict=True))
    return {name: TYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}


def choose_text(config, tokens):
    """Return (ids (1, T), description): Python's reference manual, or random ids if the vocabulary is too small."""
    T = min(tokens, config.max_position_embeddings)
    if config.vocab_size < VOCAB_SIZE:
        ids = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1337))
        return ids, f"{T:,} random ids, because text needs a vocabulary of {VOCAB_SIZE:,}"
    ids = encode(load_tokenizer(), "\n".join(pydoc_data.topics.topics.values())[: 20 * T])[:T]
    return torch.tensor([ids]), f"{len(ids):,} tokens of Python's reference manual"


def trace(model, idx):
    """Return the outputs of embed_tokens, each layer and the last norm, {name: (T, C)}, and the logits (T, V)."""
    layers = {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    states, hooks = {}, []
    for name, module in {"embed_tokens": model.model.embed_tokens, **layers, "norm": model.model.norm}.items():
        # output: (1, T, C)
        hooks.append(module.register_forward_hook(lambda _, __, output, name=name: states.update({name: output[0]})))
    output = model(idx)
    for hook in hooks:
        hook.remove()
    return states, getattr(output, "logits", output)[0]


def mean_nll(logits, idx):
    return F.cross_entropy(logits[:-1], idx[0, 1:]).item()


def check_tensors(checklist, source, tensors, types, is_135m):
    """Compare names, shapes, types and counts of a source's tensors with its config. Return True if they would load."""
    config = source.config
    expected = expected_shapes(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "lm_head.weight"}
    common = [name for name in expected if name in shapes]
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]

    notes = [f"missing: {name}" for name in missing] + [f"not part of the model: {name}" for name in extra]
    measured = f"{len(common)} of {len(expected)}" + (f", {len(extra)} more" if extra else "")
    checklist.row("tensor names", not notes, measured, "exactly these", notes[:5])
    notes = [f"{n} is {list(shapes[n])}, not {list(expected[n])}" for n in common if shapes[n] != expected[n]]
    measured = f"{len(common) - len(notes)} of {len(common)} match the config"
    checklist.row("tensor shapes", not notes, measured, "all", notes[:5])

    tally = Counter(types.values()).most_common()
    known = [kind for kind, _ in tally if kind in TOLERANCES]
    allowed = known if source.is_gguf else known[:1]  # a GGUF may mix types
    notes = [f"{name} is {kind}" for name, kind in types.items() if kind not in allowed]
    ok = None if notes and source.is_gguf else not notes  # the rounding of an unknown GGUF type cannot be judged
    bound = "known types" if source.is_gguf else "one float type"
    checklist.row("tensor types", ok, ", ".join(f"{n} {kind}" for kind, n in tally), bound, notes[:5])

    parts = SHAPES_135M
    if not is_135m:
        parts = {part: next(s for n, s in expected.items() if n.endswith(f".{part}.weight")) for part in parts}
    embedding = prod(parts["embed_tokens"])
    norm = config.hidden_size
    block = sum(map(prod, parts.values())) - embedding + 2 * norm
    total = sum(map(prod, shapes.values()))
    count = 134_515_008 if is_135m else sum(map(prod, expected.values()))
    notes = [f"= {embedding:,} + {config.num_hidden_layers} x {block:,} + {norm:,}"]
    checklist.row("parameters", total == count, f"{total:,}", f"{count:,}", notes)
    for part, shape in parts.items():
        stored = sorted({shapes[name] for name in shapes if name.endswith(f".{part}.weight")})
        heads = shape[0] // config.head_dim
        unit = {"q_proj": f" ({heads} heads)", "k_proj": f" ({heads} KV heads)"}.get(part, "")
        checklist.row(part, stored == [shape], ", ".join(str(list(s)) for s in stored) + unit, f"{list(shape)}")
    biases = [name for name in shapes if name.endswith("bias")]
    checklist.row("biases", not biases, f"{len(biases)}", "none", biases[:5])
    head = tensors.get("lm_head.weight")
    tied = head is None or torch.equal(head, tensors.get("model.embed_tokens.weight", head[:0]))
    measured = "lm_head equals embed_tokens" if tied else "lm_head.weight differs"
    checklist.row("head", tied, "no lm_head" if head is None else measured, "tied")
    return shapes == expected


def check_files(checklist, source, tensors, model):
    """Check the hashes of the files, and compare the model's values with theirs bit for bit."""
    for name, (digest, pinned) in source.files.items():
        bound = "pinned" if pinned else "no pinned hash"
        checklist.row(f"sha256 of {name}", pinned or None, f"{digest[:16]}...", bound)
    files = [source.path / name for name in source.files if name.endswith(".safetensors")]
    if not files or (source.path / "adapter_config.json").exists():
        kind = "a quantized .gguf" if source.is_gguf else "a .pt or adapter"
        checklist.row("every value, bit for bit", None, f"{kind}, not the release's safetensors")
        return
    loaded = model.state_dict()
    loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]  # files may have it under both names
    stored = {unwrap(name): tensor for path in files for name, tensor in load_file(path).items()}
    wrong = [n for n in tensors if not torch.equal(loaded[n].view(torch.int32), stored[n].float().view(torch.int32))]
    measured = f"{len(tensors) - len(wrong)} of {len(tensors)}"
    checklist.row("every value, bit for bit", not wrong, measured, "all", wrong[:5])


def check_values(checklist, reference, copy, types):
    """Check that every value of the copy is within the rounding error of its type. Return the largest ratio to it."""
    common = [name for name in reference if name in copy and copy[name].shape == reference[name].shape]
    wrong = []
    worst = 0.0
    for name in common:
        kind = types[name] if types[name] in TOLERANCES else "F32"  # an int has no rounding to excuse it
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]  # number of values that share a scale
        expected = reference[name].reshape(-1, block)
        error = copy[name].float().reshape(expected.shape) - expected
        allowed = TOLERANCES[kind].value * expected.abs().amax(1, keepdim=True)
        allowed += 2**-25 * (kind == "F16")  # F16 has a smallest step, which it uses below 6e-5
        ratio = (error.abs() / allowed).masked_fill(error == 0, 0.0)  # 0 / 0 is no error
        if bad := (~(ratio <= 1)).sum().item():  # counts NaN as bad, unlike ratio > 1
            wrong.append(f"{name}: {bad:,} of {error.numel():,} values, off by {error.norm() / expected.norm():.0e}")
        worst = max(worst, ratio.nan_to_num(torch.inf).max().item())
    notes = wrong[:5] + ([f"and {len(wrong) - 5} more tensors"] if len(wrong) > 5 else [])
    kinds = ", ".join(dict.fromkeys(types[name] for name in common))
    measured = f"worst {worst:.2g} x the rounding" if worst or not common else "identical"
    checklist.row(f"every value, rounded to {kinds}", not wrong and bool(common), measured, "within 1", notes)
    return worst


def check_model(checklist, traced, reference, idx, tolerance):
    """Compare hidden states, logits, argmax and NLL. traced, reference: (states, logits) from trace."""
    (states, logits), (expected_states, expected) = traced, reference
    errors = {name: ((states[name] - h).norm() / h.norm()).item() for name, h in expected_states.items()}
    wrong = [name for name, error in errors.items() if not error <= tolerance.hidden]  # NaN counts as wrong
    worst = wrong[0] if wrong else max(errors, key=errors.get)
    measured = f"{'first wrong at' if wrong else f'worst {errors[worst]:.1e},'} {worst}"
    values = [f"{error:.0e}" for error in errors.values()]
    notes = [f"embed_tokens {values[0]}, norm {values[-1]}"]
    notes += [f"from layer {i:>2}  {'  '.join(values[1:-1][i : i + 10])}" for i in range(0, len(values) - 2, 10)]
    name = f"hidden states, {len(errors) - 2} layers (relative)"
    if errors[worst] == 0:
        measured, notes = "identical", []
    checklist.within(name, errors[worst], tolerance.hidden, measured, notes)

    T = idx.shape[1]
    checklist.compare(f"logits at all {T:,} positions", logits, expected, tolerance.logits)
    chosen = expected.gather(1, logits.argmax(-1, keepdim=True))[:, 0]  # the reference's logit of my argmax
    matches = (chosen >= expected.amax(-1) - EXACT.logits).sum().item()  # a tie counts as a match
    enough = matches >= tolerance.argmax * T
    checklist.row("argmax token", enough, f"{matches:,} of {T:,} match", f"at least {tolerance.argmax:.0%}")
    nll, expected_nll = mean_nll(logits, idx), mean_nll(expected, idx)
    measured = f"{nll:.6f} and {expected_nll:.6f}"
    checklist.within("mean NLL, nats per token (relative)", abs(nll / expected_nll - 1), tolerance.nll, measured)


def check_decoding(checklist, source, model, oracle, idx, logits):
    """Compare greedy decoding with the oracle's, and cached decoding with the logits (T, V) of one pass over idx."""
    prompt = torch.tensor([PROMPT]) if model.config.vocab_size >= VOCAB_SIZE else idx[:, :3]
    T = min(512, idx.shape[1])
    n = min(16, max(1, T // 16), model.config.max_position_embeddings - 3)
    ids = [new.item() for new in model.generate(prompt, n, temperature=0)]
    expected = prompt
    for _ in range(n):  # without a cache, each token is computed from all earlier ones
        expected = torch.cat((expected, oracle(expected).logits[:, -1:].argmax(-1)), dim=1)
    matches = next((i for i, (a, b) in enumerate(zip(ids, expected[0, 3:], strict=True)) if a != b), n)
    checklist.row(f"greedy text, {n} tokens", matches == n, f"the first {matches} match", "all")
    if BASE_SHA256 in (digest for digest, _ in source.files.values()):
        checklist.row(f"greedy ids after {PROMPT}", ids[:2] == CONTINUATION, f"{ids[:2]}", f"{CONTINUATION}")
    else:
        checklist.row(f"greedy ids after {PROMPT}", None, "these are not the base release's weights")

    filled = T - n
    caches = [KVCache(T) for _ in model.model.layers]
    model.hidden(idx[:, :filled], caches)
    h = torch.cat([model.hidden(idx[:, t : t + 1], caches) for t in range(filled, T)], dim=1)[0]
    checklist.compare(f"cached decoding from position {filled}", model.head(h), logits[filled:T], EXACT.logits)


def check_controls(checklist, model, idx, expected):
    """Check that five models with these weights, each with one fault, miss the reference's logits (T, V)."""
    idx, expected = idx[:, :512], expected[:512]  # a quarter of the text is enough
    bound = MARGIN * EXACT.logits
    nll = mean_nll(expected, idx)
    config, tensors = model.config, model.state_dict()
    theta = config.rope_theta / 10
    middle = config.num_hidden_layers // 2
    grouped = 1 < config.num_key_value_heads < config.num_attention_heads
    unnormed = build_variant(config, tensors)
    unnormed.model.layers[middle].input_layernorm = nn.Identity()
    for name, wrong in {
        f"rope_theta {theta:,.0f}": build_variant(replace(config, rope_theta=theta), tensors),
        "interleaved RoPE": build_variant(config, tensors, rope_layout="interleaved"),
        "tiled KV heads": build_variant(config, tensors, kv_grouping="tiled") if grouped else None,
        "GELU for SiLU": build_variant(config, tensors, hidden_act="gelu"),
        f"no input_layernorm in layer {middle}": unnormed,
    }.items():
        if wrong is None:
            checklist.row(name, None, "makes no difference with these numbers of heads")
            continue
        logits = wrong(idx)[0]
        error = (logits - expected).abs().max().item()
        measured = f"fails: {error:.1e}, NLL {mean_nll(logits, idx) - nll:+.3f}"
        if not error >= bound:  # with the small random weights of an untrained model, any fault is small
            measured = f"passes: {error:.1e} is too small"
        checklist.row(name, error >= bound, measured, f"above {bound:g}")


def check_training_state(checklist, path):
    """Check that the optimizer's state in a checkpoint is finite, and that all parts are from the same iteration."""
    checkpoint = read_checkpoint(path, resume=False)
    states = list(checkpoint.get("optimizer", {}).get("state", {}).values())
    if not states:
        checklist.row("finite moments, and one iteration", None, "no optimizer state: no step yet, or a best.pt")
        return
    moments = {f"{key} of parameter {i}": state[key] for i, state in enumerate(states) for key in state}
    bad = [name for name, tensor in moments.items() if not torch.as_tensor(tensor).isfinite().all()]
    checklist.row("finite moments", not bad, f"{len(moments) - len(bad)} of {len(moments)} tensors", "all", bad[:5])
    steps = {int(state["step"]) for state in states if "step" in state}  # Muon does not count
    iterations = {checkpoint["iter_num"], checkpoint["scheduler"]["last_epoch"]} | steps
    measured = ", ".join(map(str, iterations))
    checklist.row("iteration: ckpt.pt, schedule, optimizer", len(iterations) == 1, measured, "one number")


def verify_model(checklist, source, is_135m, tokens):
    model = load_model(source)  # strict: exits if the weights do not fit
    tensors = source.read()
    print("\nThe files", flush=True)
    check_files(checklist, source, tensors, model)
    if source.source == "checkpoint":
        check_training_state(checklist, source.path)
    print("\nThe tensors", flush=True)
    check_tensors(checklist, source, tensors, read_types(source, tensors), is_135m)
    checklist.row("strict load into model.py", True, f"{len(model.state_dict())} tensors", "exactly these")

    idx, text = choose_text(source.config, tokens)
    oracle = build_oracle(source.config, tensors)
    del tensors  # frees half a gigabyte
    print(f"\nmodel.py compared with transformers, in fp32\n         on {text}", flush=True)
    traced, reference = trace(model, idx), trace(oracle, idx)
    nll = mean_nll(traced[1], idx)
    pinned = any(pinned for _, pinned in source.files.values())
    measured = f"{nll:.4f} (chance: {log(source.config.vocab_size):.2f})"
    bound = "below 3.5" if pinned else "unknown weights"
    checklist.row("mean NLL of the text, nats per token", nll <= 3.5 if pinned else None, measured, bound)
    check_model(checklist, traced, reference, idx, EXACT)
    check_decoding(checklist, source, model, oracle, idx, traced[1])

    print(f"\nNegative controls: each must miss the logits' tolerance by a factor of {MARGIN}", flush=True)
    check_controls(checklist, model, idx, reference[1])


def verify_copy(checklist, source, reference, is_135m, tokens):
    """Check a copy (source) of the reference's weights, in model.py. source, reference: a Source each."""
    tensors = source.read()
    types = read_types(source, tensors)
    print("\nThe tensors of the copy", flush=True)
    fits = check_tensors(checklist, source, tensors, types, is_135m)
    settings, expected = asdict(source.config), asdict(reference.config)
    del settings["initializer_range"]  # only matters before training
    notes = [f"{n} is {settings[n]}, not {expected[n]}" for n in settings if settings[n] != expected[n]]
    checklist.row("settings of the copy", not notes, f"{len(settings) - len(notes)} of {len(settings)}", "all", notes)
    if source.is_gguf and (unknown := sorted(set(types.values()) - TOLERANCES.keys())):
        checklist.row("values, hidden states, logits, NLL", None, f"the rounding of {', '.join(unknown)} is unknown")
        return
    state = load_model(reference).state_dict()  # in fp32
    rounding = check_values(checklist, state, tensors, types)

    idx, text = choose_text(reference.config, tokens)
    title = "The copy in model.py compared with the reference in transformers, in fp32"
    print(f"\n{title}\n         on {text}", flush=True)
    fits = fits and expected_shapes(source.config) == expected_shapes(reference.config)
    if not fits or source.config.max_position_embeddings < idx.shape[1]:
        checklist.row("hidden states, logits, NLL", None, "the copy's tensors do not fit the model")
        return
    kinds = set(types.values()) & TOLERANCES.keys() if rounding > 0 else set()
    tolerance = max((TOLERANCES[kind] for kind in kinds), key=lambda t: t.hidden, default=EXACT)  # the coarsest counts
    expected = trace(build_oracle(reference.config, state), idx)
    del state
    tensors.pop("lm_head.weight", None)
    check_model(checklist, trace(build(source.config, tensors), idx), expected, idx, tolerance)


@torch.no_grad()
def run_checks(config):
    """Print the rows, and return the Checklist."""
    if config.tokens < 2:
        reject(f"--tokens={config.tokens} leaves nothing to predict: pass at least 2")
    checklist = Checklist()
    tokens = min(config.tokens, 128) if config.quick else config.tokens
    is_135m = (config.against or config.init_from) in ("base", "instruct", "wheel")
    source = find_weights(config.init_from, base=config.base)
    print(source.about)
    if config.against:
        subject = f"{config.init_from} against {config.against}"
        reference = find_weights(config.against)
        print(reference.about)
        verify_copy(checklist, source, reference, is_135m, tokens)
    else:
        subject = "model.py against transformers"
        verify_model(checklist, source, is_135m, tokens)
    print(f"\n{subject}: {', '.join(f'{checklist.count(result)} {result}' for result in ('✓', '✗', 'skipped'))}")
    return checklist


def main(config):
    sys.exit(1 if run_checks(config).count("✗") else 0)


if __name__ == "__main__":
    main(configure(VerifyConfig))
