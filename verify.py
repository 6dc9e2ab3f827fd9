"""
Is model.py the network of the release? Official weights go in, rows of ✓ and ✗ come out; exit 0 only without ✗.

    python verify.py                                    model.py against transformers, on the release's weights
    python verify.py --weights=copy.gguf                another copy (folder, .gguf, ckpt.pt) against the release
    python verify.py --ckpt=out/ckpt.pt                 a trained checkpoint against its own settings

Each row is a measurement beside the tolerance it is held to. A row that could not be measured says "skipped"
and why. The negative controls turn it around: five wrong networks with the right shapes must fail, by a wide
margin, the comparison that model.py passes, so that the comparison is seen to see.
"""

import json
import mmap
import os
import pydoc_data.topics
import sys
from dataclasses import asdict, dataclass, replace
from math import log, prod
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

import official
from checkpoint import read_checkpoint
from configurator import configure, reject
from model import KVCache, ModelConfig, SmolLM2, rope_tables
from official import describe, find_release, load_model, load_state_dict, model_config, read_config
from tokenizer import VOCAB_SIZE, encode, load_tokenizer


@dataclass(frozen=True)
class VerifyConfig:
    """Hold model.py, a copy of the weights or a checkpoint against the release. Exit code 0: the same network."""

    official: str = "base"  # the reference: base, instruct, 360M, ..., wheel, hub:org/name, a folder, a .gguf
    weights: str = ""  # another copy of it to check: a folder, a .gguf or a ckpt.pt
    ckpt: str = ""  # or a trained checkpoint to check, against its own settings
    tokens: int = 2_048  # length of the text on which every position is compared
    json: str = ""  # file to write the rows to as well
    quick: bool = False  # 128 tokens: seconds rather than a minute


class Precision(NamedTuple):
    """What a way of storing numbers may cost."""

    block: int  # values that share a scale
    error: float  # largest error of a value, as a share of the largest value in its block
    hidden: float  # relative error (Frobenius) of the hidden states
    logits: float  # largest error of a logit
    argmax: float  # share of positions whose likeliest token stays the same
    nll: float  # change of the mean NLL, as a share of it


# The rounding of each type sets `error`: half a step, but a whole one for Q4_1, whose writers choose scales freely.
# The rest is measured on SmolLM2-135M at T = 2,048, with room: hidden states 1e-6, 5e-4, 3e-3, 0.02, 0.27, top to
# bottom; logits (the largest is 43) 7e-5, 0.03, 0.28, 1.4, 19; argmax 100, 99.9, 99.6, 98, 74 %; NLL 0, 0, 0.02,
# 0.1, 13 %. Hidden states are judged relatively, for some values reach 21,000 where most are near 1.
PRECISION = {
    "F32": Precision(1, 2**-24, 1e-5, 5e-4, 1.0, 1e-5),
    "F16": Precision(1, 2**-11, 5e-3, 0.5, 0.98, 1e-3),
    "BF16": Precision(1, 2**-8, 3e-2, 3.0, 0.95, 1e-2),
    "Q8_0": Precision(32, 1 / 200, 0.1, 10.0, 0.9, 3e-2),
    "Q4_1": Precision(32, 2 / 15, 0.6, 60.0, 0.5, 0.5),
}
EXACT = PRECISION["F32"]  # for two networks with the same weights, both in fp32
MARGIN = 10  # a negative control must miss EXACT by this factor
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors and GGUF call them
BASE_SHA256 = official.SHA256["HuggingFaceTB/SmolLM2-135M"]["model.safetensors"]
OF_135M = ("base", "instruct", "wheel")  # known beforehand, so config.json need not be believed:
SHAPES_135M = {
    "embed_tokens": (49_152, 576),
    "q_proj": (576, 576),  # 9 heads of 64
    "k_proj": (192, 576),  # 3 KV heads of 64
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1_536, 576),
    "up_proj": (1_536, 576),
    "down_proj": (576, 1_536),
}
COUNT_135M = 134_515_008
PROMPT, CONTINUATION = [22007, 6463, 314], [260, 3075]  # greedy, from the base release
NO_TRANSFORMERS = "no transformers: pip install transformers"


class Table:
    """Prints each row as soon as it is known; keeps them all, for the exit code and --json."""

    def __init__(self):
        self.rows, self.section = [], ""

    def heading(self, text, detail=""):
        self.section = text
        print(f"\n{text}" + f"\n{'':<9}{detail}" * bool(detail), flush=True)

    def row(self, name, ok, measured, bound="", notes=()):
        """ok: True, False, or None for what could not be measured, and then `measured` says why."""
        mark = {True: "✓", False: "✗", None: "skipped"}[ok]
        kept = dict(section=self.section, row=name, result=mark, measured=measured, bound=bound, notes=list(notes))
        self.rows.append(kept)
        print(f"{mark:<9}{name:<41} {measured:<29} {bound}".rstrip(), flush=True)
        for note in notes:
            print(f"{'':<11}{note}", flush=True)

    def within(self, name, error, tolerance, measured, notes=()):
        self.row(name, error <= tolerance, measured, f"within {tolerance:g}", notes)  # NaN is within nothing

    def skip(self, name, why):
        self.row(name, None, why)

    def count(self, mark):
        return sum(row["result"] == mark for row in self.rows)


# ---------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Weights:
    """A set of tensors as some file holds them."""

    config: ModelConfig
    tensors: dict  # name: tensor, in the file's dtype (fp32 where it was quantised)
    types: dict  # name: how the file stores it: F32, BF16, Q4_1, ...
    quantised: bool  # a .gguf, in which types may be mixed


def release_weights(release):
    config, tensors = model_config(read_config(release)), load_state_dict(release)
    types = {name: NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
    quantised = release.path.suffix == ".gguf"
    if quantised:  # the tensors come in the file's order
        types = dict(zip(tensors, (t.tensor_type.name for t in official.read_gguf(release.path).tensors), strict=True))
    return Weights(config, tensors, types, quantised)


def checkpoint_weights(path, checkpoint):
    try:
        config = ModelConfig(**{name: checkpoint["config"][name] for name in asdict(ModelConfig())})
        types = {name: NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in checkpoint["model"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        sys.exit(f"error: {path} describes no network ({type(error).__name__}: {error}): take an earlier checkpoint")
    return Weights(config, checkpoint["model"], types, False)


def build(config, tensors):
    """SmolLM2 of these tensors, which it shares; no time goes into random weights first."""
    with torch.device("meta"):  # shapes without memory
        network = SmolLM2(config)
    network.load_state_dict({name: tensors[name].float() for name in network.state_dict()}, assign=True)
    network.cos, network.sin = rope_tables(config, config.max_position_embeddings)
    return network.eval()


def transformers_network(release, tensors):
    """The release in Hugging Face's code, fp32 with plain attention; None where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = dict(attn_implementation="eager", use_cache=False)
    if release.path.suffix == ".gguf":
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**read_config(release), **settings))
        network.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    else:  # read by their own code, from the files on
        network = transformers.LlamaForCausalLM.from_pretrained(
            release.path, dtype=torch.float32, use_safetensors=True, local_files_only=True, **settings
        )
    return network.eval()


def text_ids(config, tokens):
    """(1, T) ids of Python's reference manual, and what they are; drawn at random if they would not fit."""
    T = min(tokens, config.max_position_embeddings)
    if config.vocab_size < VOCAB_SIZE:
        ids = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1337))
        return ids, f"{T:,} ids drawn at random: the text's need a vocabulary of {VOCAB_SIZE:,}"
    ids = encode(load_tokenizer(), "\n".join(pydoc_data.topics.topics.values())[: 20 * T])[:T]
    return torch.tensor([ids]), f"{len(ids):,} tokens of Python's reference manual"


def trace(network, idx):
    """idx (1, T) -> {"layer 0": what comes out of it (T, C), ...} and logits (T, V), of either library's network."""
    modules = {f"layer {i}": layer for i, layer in enumerate(network.model.layers)}
    modules = {"embed_tokens": network.get_submodule("model.embed_tokens")} | modules
    modules["norm"] = network.get_submodule("model.norm")
    states, hooks = {}, []
    for name, module in modules.items():

        def keep(module, inputs, output, name=name):
            states[name] = output[0]  # (1, T, C) -> (T, C)

        hooks.append(module.register_forward_hook(keep))
    output = network(idx)
    for hook in hooks:
        hook.remove()
    return states, getattr(output, "logits", output)[0]


def mean_nll(logits, idx):
    return F.cross_entropy(logits[:-1], idx[0, 1:]).item()


def farthest(logits, reference):
    return (logits - reference).abs().max().item()


# ---------------------------------------------------------------------------------------------
# The rows


def check_tensors(table, weights, is_135m):
    """Names, shapes, types and counts of a file's tensors, against its config. True if they would load."""
    config, tensors = weights.config, weights.tensors
    with torch.device("meta"):  # shapes without memory
        expected = {name: tuple(tensor.shape) for name, tensor in SmolLM2(config).state_dict().items()}
    head = tensors.get("lm_head.weight")  # some files repeat the tied head
    tied = head is None or torch.equal(head, tensors.get("model.embed_tokens.weight", torch.empty(0)))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "lm_head.weight"}
    missing, extra = [n for n in expected if n not in shapes], [n for n in shapes if n not in expected]
    misshapen = [n for n in expected if n in shapes and shapes[n] != expected[n]]

    notes = [f"missing: {name}" for name in missing] + [f"not part of the network: {name}" for name in extra]
    found = len(expected) - len(missing)
    measured = f"{found} of {len(expected)}" + f", {len(extra)} more" * bool(extra)
    table.row("names of the tensors", not notes, measured, "all, and no other", notes[:5])
    notes = [f"{name} is {list(shapes[name])}, not {list(expected[name])}" for name in misshapen]
    table.row("their shapes", not notes, f"{found - len(notes)} of {found} as config says", "all", notes[:5])

    kinds = list(weights.types.values())
    tally = {kind: kinds.count(kind) for kind in sorted(set(kinds), key=kinds.count, reverse=True)}
    known = [kind for kind in tally if kind in PRECISION]
    usual = known if weights.quantised else known[:1]
    notes = [f"{name} is {kind}" for name, kind in weights.types.items() if kind not in usual]
    bound = "types known here" if weights.quantised else "one float type"
    table.row("their types", not notes, ", ".join(f"{n} {kind}" for kind, n in tally.items()), bound, notes[:5])

    listed = {part: next(s for n, s in expected.items() if n.endswith(f".{part}.weight")) for part in SHAPES_135M}
    listed = SHAPES_135M if is_135m else listed
    embedding, norm = prod(listed["embed_tokens"]), config.hidden_size
    block = sum(map(prod, listed.values())) - embedding + 2 * norm
    total, count = sum(map(prod, shapes.values())), embedding + config.num_hidden_layers * block + norm
    count = COUNT_135M if is_135m else count
    notes = [f"= {embedding:,} + {config.num_hidden_layers} x {block:,} + {norm:,}"]
    table.row("parameters", total == count, f"{total:,}", f"{count:,}", notes)
    for part, shape in listed.items():
        here = sorted({shapes[name] for name in shapes if name.endswith(f".{part}.weight")})
        D = config.head_dim
        heads = {"q_proj": f" ({shape[0] // D} heads)", "k_proj": f" ({shape[0] // D} KV heads)"}.get(part, "")
        table.row(part, here == [shape], ", ".join(str(list(s)) for s in here) + heads, f"{list(shape)}")
    biases = [name for name in shapes if name.endswith("bias")]
    table.row("biases", not biases, f"{len(biases)}", "none", biases[:5])
    said = "no lm_head" if head is None else "lm_head equals embed_tokens" if tied else "lm_head.weight differs"
    table.row("the head is tied", tied, said, "no other head")
    return not missing + extra + misshapen


def check_files(table, release, weights, network):
    """The files' hashes, and their values bit for bit."""
    for name, (digest, pinned) in release.sha256.items():
        if pinned:
            table.row(f"sha256 of {name}", True, f"{digest[:16]}...", "as pinned")
        else:
            table.skip(f"sha256 of {name}", f"{digest[:16]}..., no hash is pinned")
    if weights.quantised:
        table.skip("every value, bit for bit", "a quantised .gguf, not the release's safetensors")
        return
    loaded, same = network.state_dict(), []
    for file in (release.path / name for name in release.sha256 if name.endswith(".safetensors")):
        for name, values in raw_tensors(file):
            mine = loaded["model.embed_tokens.weight" if name == "lm_head.weight" else name]
            if torch.equal(mine.view(torch.int32), values.view(torch.int32)):
                same.append(name)
    wrong = [name for name in weights.tensors if name not in same]
    measured = f"{len(same)} of {len(weights.tensors)} tensors"
    table.row("every value, bit for bit", not wrong, measured, "all", wrong[:5])


def raw_tensors(path):
    """
    (name, values in fp32) of a safetensors file, read by its published layout rather than by the library:
    the length of the header (8 bytes, little-endian), the header (JSON), the values.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            dtype = next((dtype for dtype, kind in NAMES.items() if kind == entry.get("dtype")), None)
            if dtype is not None:
                begin, end = (start + offset for offset in entry["data_offsets"])
                yield name, torch.frombuffer(bytearray(content[begin:end]), dtype=dtype).view(entry["shape"]).float()


def check_values(table, reference, copy):
    """Every value within the rounding of the copy's type. reference: name -> fp32 tensor. The worst, in roundings."""
    common = [name for name in reference if name in copy.tensors and copy.tensors[name].shape == reference[name].shape]
    wrong, worst = [], 0.0
    for name in common:
        precision = PRECISION.get(copy.types[name], EXACT)
        expected = reference[name].reshape(-1, precision.block)
        error = copy.tensors[name].float().reshape(expected.shape) - expected
        allowed = precision.error * expected.abs().amax(1, keepdim=True)  # by the largest value of each block
        allowed += 2**-25 * (copy.types[name] == "F16")  # below 6e-5 its steps no longer shrink
        ratio = (error.abs() / allowed).masked_fill(error == 0, 0.0)  # 0 / 0 is no error
        bad = (~(ratio <= 1)).sum().item()  # so put, NaN is bad
        if bad:
            share = error.norm() / expected.norm()
            wrong.append(f"{name}: {bad:,} of {error.numel():,} values, off by {share:.0e}")
        worst = max(worst, ratio.nan_to_num(torch.inf).max().item())
    types = ", ".join(dict.fromkeys(copy.types[name] for name in common))
    notes = wrong[:5] + [f"and {len(wrong) - 5} more tensors"] * (len(wrong) > 5)
    measured = f"worst {worst:.2g} x its rounding"
    table.row(f"every value, as {types} rounds it", not wrong and bool(common), measured, "within 1", notes)
    return worst


def check_network(table, mine, reference, idx, precision):
    """Hidden states, logits, argmax and NLL of (states, logits) against (states, logits)."""
    (states, logits), (expected_states, expected) = mine, reference
    errors = {name: ((states[name] - h).norm() / h.norm()).item() for name, h in expected_states.items()}
    departed = [name for name, error in errors.items() if not error <= precision.hidden]
    worst = departed[0] if departed else max(errors, key=errors.get)
    measured = f"departs first at {worst}" if departed else f"worst {errors[worst]:.1e}, {worst}"
    values = [f"{error:.0e}" for error in errors.values()]
    notes = [f"embed_tokens {values[0]}, norm {values[-1]}"]
    notes += [f"layers {i:>2} on  {'  '.join(values[1:-1][i : i + 10])}" for i in range(0, len(values) - 2, 10)]
    table.within(
        f"hidden states, {len(errors) - 2} layers (relative)", errors[worst], precision.hidden, measured, notes
    )

    T = idx.shape[1]
    error = farthest(logits, expected)
    table.within(f"logits at all {T:,} positions", error, precision.logits, f"largest difference {error:.1e}")
    chosen = expected.gather(1, logits.argmax(-1, keepdim=True))[:, 0]  # what the reference thinks of my choice
    same = (chosen >= expected.amax(-1) - EXACT.logits).sum().item()  # a tie is no disagreement
    bound = f"at least {precision.argmax:.0%}"
    table.row("likeliest token", same >= precision.argmax * T, f"the same at {same:,} of {T:,}", bound)
    nll, expected_nll = mean_nll(logits, idx), mean_nll(expected, idx)
    measured = f"{nll:.6f} and {expected_nll:.6f}"
    table.within("mean NLL, nats per token (relative)", abs(nll / expected_nll - 1), precision.nll, measured)


def check_decoding(table, release, network, oracle, idx, logits):
    """Greedy text, and the cache."""
    real = network.config.vocab_size >= VOCAB_SIZE
    prompt = torch.tensor([PROMPT]) if real else idx[:, :3]
    T = min(512, idx.shape[1])
    n = min(16, max(1, T // 16), network.config.max_position_embeddings - 3)
    ids = [new.item() for new in network.generate(prompt, n, temperature=0)]
    if oracle is None:
        table.skip(f"greedy text, {n} tokens", NO_TRANSFORMERS)
    else:
        expected = prompt
        for _ in range(n):  # no cache: each token from all those before it
            expected = torch.cat((expected, oracle(expected).logits[:, -1:].argmax(-1)), dim=1)
        same = next((i for i, (a, b) in enumerate(zip(ids, expected[0, 3:], strict=True)) if a != b), n)
        table.row(f"greedy text, {n} tokens", same == n, f"the first {same} are the same", "all")
    name = f"greedy ids after {PROMPT}"
    if BASE_SHA256 in (digest for digest, _ in release.sha256.values()):
        table.row(name, ids[:2] == CONTINUATION, f"{ids[:2]}", f"{CONTINUATION}")
    else:
        table.skip(name, "these weights are not the base release's")

    filled = T - n
    caches = [KVCache(T) for _ in network.model.layers]
    network.hidden(idx[:, :filled], caches)
    h = torch.cat([network.hidden(idx[:, t : t + 1], caches) for t in range(filled, T)], dim=1)[0]
    error = farthest(F.linear(h, network.model.embed_tokens.weight), logits[filled:T])
    name = f"cached decoding, positions {filled} on"
    table.within(name, error, EXACT.logits, f"largest difference {error:.1e}")


def wrong_networks(config, tensors):
    """(name, network): the same tensors and shapes, one thing wrong. Use each before the next is drawn."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, o = ([name for name in tensors if name.endswith(f"{part}_proj.weight")] for part in "qko")
    theta = config.rope_theta / 10
    yield f"rope_theta {theta:,.0f}", build(replace(config, rope_theta=theta), tensors)

    # Pairs (2i, 2i + 1) in place of (i, i + D/2): each head's rows reordered, and the rest left as it is
    pairs = {n: tensors[n].unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2) for n in q + k}
    yield "interleaved RoPE", build(config, tensors | pairs)

    # Query head h reads KV head h % K in place of h // (H/K): the query heads reordered
    order = torch.arange(H).view(H // K, K).T.flatten()
    tiled = {n: tensors[n].unflatten(0, (H, D))[order].flatten(0, 1) for n in q}
    tiled |= {n: tensors[n].unflatten(1, (H, D))[:, order].flatten(1, 2) for n in o}
    yield "tiled KV heads", build(config, tensors | tiled) if 1 < K < H else None

    with patch.object(F, "silu", F.gelu):
        yield "GELU for SiLU", build(config, tensors)

    network, middle = build(config, tensors), config.num_hidden_layers // 2
    network.model.layers[middle].input_layernorm = nn.Identity()
    yield f"no input_layernorm in layer {middle}", network


def check_controls(table, network, idx, expected):
    """Each wrong network against the reference's logits (T, V)."""
    T = min(512, idx.shape[1])  # enough, and a quarter of the time
    idx, expected, bound = idx[:, :T], expected[:T], MARGIN * EXACT.logits
    nll = mean_nll(expected, idx)
    for name, wrong in wrong_networks(network.config, network.state_dict()):
        if wrong is None:
            table.skip(name, "with these heads, the same network")
            continue
        logits = wrong(idx)[0]
        error = farthest(logits, expected)
        measured = f"fails: {error:.1e}, NLL {mean_nll(logits, idx) - nll:+.3f}"
        if not error >= bound:
            measured = f"passes: {error:.1e}, too quiet to tell"  # small random weights hardly show what is wrong
        table.row(name, error >= bound, measured, f"above {bound:g}")


# ---------------------------------------------------------------------------------------------
# The three things to verify


def verify_model(table, release, tokens):
    """model.py, with the release's weights."""
    network = load_model(release).eval()  # strict, or one line and out
    weights = release_weights(release)
    table.heading("The files")
    check_files(table, release, weights, network)
    table.heading("The tensors")
    check_tensors(table, weights, release.asked in OF_135M)
    names = len(network.state_dict())
    table.row("strict load into model.py", True, f"{names} of {names} tensors", "all, and no other")

    idx, text = text_ids(network.config, tokens)
    oracle = transformers_network(release, weights.tensors)
    del weights  # half a gigabyte
    table.heading(f"model.py against {'transformers' if oracle else 'itself'}, in fp32", f"on {text}")
    mine = trace(network, idx)
    nll, chance, name = mean_nll(mine[1], idx), log(network.config.vocab_size), "it reads: mean NLL, nats per token"
    if any(pinned for _, pinned in release.sha256.values()):
        table.row(name, nll <= 3.5, f"{nll:.4f} (chance: {chance:.2f})", "below 3.5")
    else:
        table.skip(name, f"{nll:.4f} (chance: {chance:.2f}); unknown weights")
    if oracle is None:
        expected = mine[1]
        for name in ("hidden states", "logits", "likeliest token", "mean NLL"):
            table.skip(name, NO_TRANSFORMERS)
    else:
        reference = trace(oracle, idx)
        expected = reference[1]
        check_network(table, mine, reference, idx, EXACT)
        del reference
    check_decoding(table, release, network, oracle, idx, mine[1])
    del oracle, mine

    table.heading(f"Negative controls: each must fail by {MARGIN} times the tolerance of the logits")
    check_controls(table, network, idx, expected)


def verify_copy(table, release, path, tokens):
    """Another copy of the release's weights, in model.py."""
    if path.endswith(".pt"):
        copy = checkpoint_weights(path, read_checkpoint(path, mmap=True))
    else:
        other = find_release(path)
        print(describe(other))
        copy = release_weights(other)
    reference = load_model(release).eval()
    config, tensors = reference.config, reference.state_dict()
    table.heading("The tensors of the copy")
    fits = check_tensors(table, copy, release.asked in OF_135M)
    said, meant = asdict(copy.config), asdict(config)
    del said["initializer_range"]  # of no matter once there are weights
    notes = [f"{name} is {said[name]}, not {meant[name]}" for name in said if said[name] != meant[name]]
    table.row("its config", not notes, f"{len(said) - len(notes)} of {len(said)} settings", "all", notes)
    rounding = check_values(table, tensors, copy)

    idx, text = text_ids(config, tokens)
    oracle = transformers_network(release, tensors) or reference
    library = "model.py" if oracle is reference else "transformers"
    table.heading(f"The copy in model.py against the reference in {library}, in fp32", f"on {text}")
    shapes = {name: tensor.shape for name, tensor in copy.tensors.items() if name != "lm_head.weight"}
    fits = fits and shapes == {name: tensor.shape for name, tensor in tensors.items()}
    if not fits or copy.config.max_position_embeddings < idx.shape[1]:
        table.skip("hidden states, logits, NLL", "the copy's tensors do not fit the network")
        return
    precision = EXACT
    if rounding > 0:  # the coarsest type says what the network may lose
        known = [PRECISION[kind] for kind in copy.types.values() if kind in PRECISION]
        precision = max(known, default=EXACT, key=lambda precision: precision.hidden)
    expected = trace(oracle, idx)
    del oracle, reference, tensors
    check_network(table, trace(build(copy.config, copy.tensors), idx), expected, idx, precision)


def verify_checkpoint(table, path):
    """A ckpt.pt of train.py: nothing in it is run, and its parts agree."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint_weights(path, checkpoint)
    table.heading(f"{path}, iteration {checkpoint['iter_num']}")
    table.row("loads with weights_only=True", True, f"{len(checkpoint)} entries", "plain values")
    check_tensors(table, weights, False)
    table.row("finite weights", *all_finite(weights.tensors))
    states = list(checkpoint["optimizer"].get("state", {}).values())
    if not states:
        table.skip("finite moments, and one iteration", "the optimizer has not stepped yet")
        return
    table.row(
        "finite moments", *all_finite({f"{key} of parameter {i}": s[key] for i, s in enumerate(states) for key in s})
    )
    steps = {int(state["step"]) for state in states}
    iterations = {checkpoint["iter_num"], checkpoint["scheduler"].get("last_epoch")} | steps
    measured = ", ".join(map(str, iterations))
    table.row("iteration: ckpt.pt, schedule, AdamW", len(iterations) == 1, measured, "one number")


def all_finite(tensors):
    bad = [name for name, tensor in tensors.items() if not torch.as_tensor(tensor).isfinite().all()]
    return not bad, f"{len(tensors) - len(bad)} of {len(tensors)} tensors", "all", bad[:5]


@torch.no_grad()
def main(config):
    if config.weights and config.ckpt:
        reject("--weights and --ckpt are two questions: ask one at a time")
    if config.tokens < 2:
        reject(f"--tokens={config.tokens} leaves nothing to predict: give at least 2")
    table, tokens = Table(), min(config.tokens, 128) if config.quick else config.tokens
    if config.ckpt:
        subject = config.ckpt
        verify_checkpoint(table, config.ckpt)
    else:
        release = find_release(config.official)
        subject = config.weights or "model.py"
        print(describe(release))
        if config.weights:
            verify_copy(table, release, config.weights, tokens)
        else:
            verify_model(table, release, tokens)

    failed, skipped = table.count("✗"), table.count("skipped")
    print(f"\n{subject}: {table.count('✓')} ✓, {failed} ✗, {skipped} skipped")
    if config.json:
        write_json(Path(config.json), table.rows)
    sys.exit(1 if failed else 0)


def write_json(path, rows):
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        sys.exit(f"error: {path} could not be written: {error.strerror}")


if __name__ == "__main__":
    main(configure(VerifyConfig))
