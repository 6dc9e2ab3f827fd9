"""
Is model.py the network of the release? The official weights go in; rows of ✓ and ✗ come out, one for each check.

    python verify.py                        compare model.py with transformers, both with the release's weights
    python verify.py --weights=copy.gguf    compare a copy (a folder, a .gguf or a ckpt.pt) with the release
    python verify.py --ckpt=out/ckpt.pt     compare a trained checkpoint with its own settings

Each row shows a measurement beside its tolerance. A row that could not be measured says "skipped" and why. The exit
code is 0 only if no row says ✗.

The negative controls show that the comparison can fail. They are five wrong networks with the right shapes, and each
must miss the tolerance by a wide margin.
"""

import json
import mmap
import pydoc_data.topics
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import inf, log, prod
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import configure, reject
from lib.checkpoint import read_checkpoint
from lib.files import written_whole
from lib.formats import is_gguf
from lib.gguf import read_gguf_types
from lib.layouts import deinterleave, tile_heads
from lib.official import SHA256, describe, find_release
from lib.tokenizer import VOCAB_SIZE, encode, load_tokenizer
from lib.weights import (
    build,
    checkpoint_config,
    expected_shapes,
    find_weights,
    head_is_tied,
    load_network,
    prefix_of,
    read_config,
    release_source,
    release_tensors,
    stored_tensors,
)
from model import KVCache, ModelConfig


@dataclass(frozen=True)
class VerifyConfig:
    """Compare model.py, a copy of the weights, or a checkpoint with the release. Exit code 0: no check failed."""

    official: str = "base"  # the reference: base, instruct, 360M, ..., wheel, hub:org/name, a folder, a .gguf
    weights: str = ""  # compare this copy with the reference: a folder, a .gguf or a ckpt.pt
    ckpt: str = ""  # compare this trained checkpoint with its own settings
    tokens: int = 2_048  # length of the text that the networks read; every position is compared
    json: str = ""  # also write the rows to this file
    quick: bool = False  # 128 tokens: takes seconds instead of a minute


class Precision(NamedTuple):
    """The errors that one storage type may cause."""

    block: int  # number of values that share a scale
    error: float  # largest error of a value, relative to the largest value in its block
    hidden: float  # relative error (Frobenius norm) of the hidden states; inf: they tell nothing
    logits: float  # largest absolute error of a logit
    argmax: float  # share of positions where the argmax token stays the same
    nll: float  # relative change of the mean NLL


# `error` is the rounding: half a step for the floats and Q8_0; it was measured for the others. The other tolerances
# were measured on SmolLM2-135M at T = 2,048. All were then rounded up generously. Measured, for F32, F16, BF16, Q8_0,
# Q4_1: hidden states 1e-6, 5e-4, 3e-3, 0.02, 0.27; logits (the largest is 43) 7e-5, 0.03, 0.28, 1.4, 19; argmax 100,
# 99.9, 99.6, 98, 74 %; NLL 0, 0, 0.02, 0.1, 13 %. The error of the hidden states is relative because a few of their
# values reach 21,000, while most are near 1.
#
# The rows below Q4_1 are from the wheel's weights with 1 % of noise, every matrix in that type as llama.cpp (ggml
# 0.25.3) writes it. Measured, for Q6_K, Q5_K, Q4_K, Q5_1, Q5_0, IQ4_NL, IQ4_XS, Q4_0, MXFP4, Q3_K: hidden states 0.07,
# 0.09, 0.08, 0.18, 0.16, 0.24, 0.25, 0.31, 0.80, 0.49; logits 6, 5, 8, 13, 7, 14, 14, 17, 33, 28; argmax 94, 90, 84,
# 84, 85, 74, 72, 71, 52, 46 %; NLL 0.8, 1.8, 3.6, 4, 4, 9, 9, 13, 40, 45 %. The rounding, relative to the largest
# value of a block, was at most 0.02, 0.05, 0.10, 0.03, 0.06, 0.12, 0.13, 0.13, 0.25, 0.22 (Q4_1: 0.05). With an
# importance matrix, which gives up precision where it matters little, it was 0.15, 0.16, 0.37, 0.19, 0.46, 0.56, 0.60,
# 0.57, 0.25, 0.57 (Q4_1: 0.16).
# Q2_K rounds by at most 0.43, with an importance matrix by 0.99. With every matrix in it this network is lost (argmax
# 0.2 %, NLL +497 %), so that only its values can be judged. The other types of 1 to 3 bits were not measured.
PRECISION = {
    "F32": Precision(1, 2**-24, 1e-5, 5e-4, 1.0, 1e-5),
    "F16": Precision(1, 2**-11, 5e-3, 0.5, 0.98, 1e-3),
    "BF16": Precision(1, 2**-8, 3e-2, 3.0, 0.95, 1e-2),
    "Q8_0": Precision(32, 1 / 200, 0.1, 10.0, 0.9, 3e-2),
    "Q4_1": Precision(32, 1 / 4, 0.6, 60.0, 0.5, 0.5),
    "Q6_K": Precision(256, 1 / 4, 0.3, 20.0, 0.8, 5e-2),
    "Q5_K": Precision(256, 1 / 3, 0.3, 20.0, 0.7, 0.1),
    "Q4_K": Precision(256, 1 / 2, 0.3, 30.0, 0.6, 0.2),
    "Q5_1": Precision(32, 1 / 4, 0.5, 50.0, 0.6, 0.2),
    "Q5_0": Precision(32, 1 / 2, 0.5, 50.0, 0.6, 0.2),
    "IQ4_NL": Precision(32, 3 / 4, 0.8, 50.0, 0.5, 0.4),
    "IQ4_XS": Precision(256, 3 / 4, 0.8, 50.0, 0.5, 0.4),
    "Q4_0": Precision(32, 3 / 4, 1.0, 60.0, 0.4, 0.6),
    "MXFP4": Precision(32, 1 / 3, 2.0, 100.0, 0.2, 1.5),
    "Q3_K": Precision(256, 4 / 5, 1.5, 90.0, 0.2, 1.5),
    "Q2_K": Precision(256, 3 / 2, inf, inf, 0.0, inf),
}
EXACT = PRECISION["F32"]  # for two networks with the same weights, both in fp32
MARGIN = 10  # a negative control must miss EXACT by this factor
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as in safetensors and GGUF
BASE_SHA256 = SHA256["HuggingFaceTB/SmolLM2-135M"]["model.safetensors"]

# The 135M in literal numbers, typed in from the release. They repeat PRESETS on purpose: a wrong model.py, or a wrong
# config.json, must not be able to confirm itself.
OF_135M = ("base", "instruct", "wheel")
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
PROMPT, CONTINUATION = [22007, 6463, 314], [260, 3075]  # greedy decoding with the base release
NO_TRANSFORMERS = "no transformers: pip install transformers"


class Checklist:
    """Prints each row as soon as it is known. Keeps all rows, for the exit code and for --json."""

    def __init__(self):
        self.rows, self.section = [], ""

    def heading(self, text, detail=""):
        self.section = text
        print(f"\n{text}" + f"\n{'':<9}{detail}" * bool(detail), flush=True)

    def row(self, name, ok, measured, bound="", notes=()):
        """ok: True, False, or None if the row could not be measured; then `measured` says why."""
        mark = {True: "✓", False: "✗", None: "skipped"}[ok]
        kept = dict(section=self.section, row=name, result=mark, measured=measured, bound=bound, notes=list(notes))
        self.rows.append(kept)
        print(f"{mark:<9}{name:<41} {measured:<29} {bound}".rstrip(), flush=True)
        for note in notes:
            print(f"{'':<11}{note}", flush=True)

    def within(self, name, error, tolerance, measured, notes=()):
        self.row(name, error <= tolerance, measured, f"within {tolerance:g}", notes)  # False if the error is NaN

    def skip(self, name, why):
        self.row(name, None, why)

    def count(self, mark):
        return sum(row["result"] == mark for row in self.rows)


# ---------------------------------------------------------------------------------------------
# What is compared


class Weights(NamedTuple):
    """The tensors of a file or folder, as it stores them."""

    config: ModelConfig
    tensors: dict  # name: tensor, in the file's dtype (fp32 from a GGUF)
    types: dict  # name: storage type: F32, BF16, Q4_1, ...
    quantised: bool  # a GGUF, which may mix types


def as_stored(path, config, tensors):
    """The Weights of a config and tensors that were read from `path`."""
    quantised = is_gguf(path)
    if quantised:
        types = dict(zip(tensors, read_gguf_types(path), strict=True))
    else:
        types = {name: TYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
    return Weights(config, tensors, types, quantised)


def transformers_network(release, tensors):
    """The release in Hugging Face's code, in fp32 with plain attention. None if transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = dict(attn_implementation="eager", use_cache=False)
    own_files = release.sha256.keys() & {"model.safetensors", "model.safetensors.index.json"}
    if not own_files or prefix_of(stored_tensors(release)):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**read_config(release.path) | settings))
        network.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    else:  # transformers reads the files itself
        network = transformers.LlamaForCausalLM.from_pretrained(
            release.path, dtype=torch.float32, use_safetensors=True, local_files_only=True, **settings
        )
    return network.eval()


def text_to_compare(config, tokens):
    """
    (ids (1, T), a description of them): Python's reference manual, or random ids if the network's vocabulary is
    smaller than the tokenizer's.
    """
    T = min(tokens, config.max_position_embeddings)
    if config.vocab_size < VOCAB_SIZE:
        ids = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1337))
        return ids, f"{T:,} random ids, because a text needs a vocabulary of {VOCAB_SIZE:,}"
    ids = encode(load_tokenizer(), "\n".join(pydoc_data.topics.topics.values())[: 20 * T])[:T]
    return torch.tensor([ids]), f"{len(ids):,} tokens of Python's reference manual"


def trace(network, idx):
    """
    Run either library's network on idx (1, T). Returns the outputs of embed_tokens, of every layer and of the last
    norm, {"layer 0": (T, C), ...}, and the logits (T, V).
    """
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


def largest_difference(logits, reference):
    return (logits - reference).abs().max().item()


# ---------------------------------------------------------------------------------------------
# The rows


def check_tensors(checklist, weights, is_135m):
    """Compare names, shapes, types and counts of a file's tensors with its config. True if they would load."""
    config, tensors = weights.config, weights.tensors
    expected = expected_shapes(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "lm_head.weight"}
    missing, extra = [n for n in expected if n not in shapes], [n for n in shapes if n not in expected]
    misshapen = [n for n in expected if n in shapes and shapes[n] != expected[n]]

    notes = [f"missing: {name}" for name in missing] + [f"not part of the network: {name}" for name in extra]
    found = len(expected) - len(missing)
    measured = f"{found} of {len(expected)}" + f", {len(extra)} more" * bool(extra)
    checklist.row("names of the tensors", not notes, measured, "all, and no other", notes[:5])
    notes = [f"{name} is {list(shapes[name])}, not {list(expected[name])}" for name in misshapen]
    checklist.row("their shapes", not notes, f"{found - len(notes)} of {found} as config says", "all", notes[:5])

    tally = Counter(weights.types.values()).most_common()
    known = [kind for kind, _ in tally if kind in PRECISION]
    unknown = [f"{name} is {kind}" for name, kind in weights.types.items() if kind not in PRECISION]
    mixed = [f"{name} is {kind}" for name, kind in weights.types.items() if kind not in known[:1]]
    notes, ok = mixed, not mixed
    if weights.quantised:
        notes, ok = unknown, None if unknown else True  # how an unknown type rounds cannot be judged
    bound = "types known here" if weights.quantised else "one float type"
    checklist.row("their types", ok, ", ".join(f"{n} {kind}" for kind, n in tally), bound, notes[:5])

    listed = {part: next(s for n, s in expected.items() if n.endswith(f".{part}.weight")) for part in SHAPES_135M}
    listed = SHAPES_135M if is_135m else listed
    embedding, norm = prod(listed["embed_tokens"]), config.hidden_size
    block = sum(map(prod, listed.values())) - embedding + 2 * norm
    total, count = sum(map(prod, shapes.values())), COUNT_135M if is_135m else sum(map(prod, expected.values()))
    notes = [f"= {embedding:,} + {config.num_hidden_layers} x {block:,} + {norm:,}"]
    checklist.row("parameters", total == count, f"{total:,}", f"{count:,}", notes)
    for part, shape in listed.items():
        here = sorted({shapes[name] for name in shapes if name.endswith(f".{part}.weight")})
        D = config.head_dim
        heads = {"q_proj": f" ({shape[0] // D} heads)", "k_proj": f" ({shape[0] // D} KV heads)"}.get(part, "")
        checklist.row(part, here == [shape], ", ".join(str(list(s)) for s in here) + heads, f"{list(shape)}")
    biases = [name for name in shapes if name.endswith("bias")]
    checklist.row("biases", not biases, f"{len(biases)}", "none", biases[:5])
    tied = head_is_tied(tensors)
    measured = "lm_head equals embed_tokens" if tied else "lm_head.weight differs"
    measured = measured if "lm_head.weight" in tensors else "no lm_head"
    checklist.row("the head is tied", tied, measured, "no other head")
    return not missing + extra + misshapen


def check_files(checklist, release, weights, network):
    """Check the hashes of the files, and compare the network's values with theirs bit for bit."""
    for name, (digest, pinned) in release.sha256.items():
        if pinned:
            checklist.row(f"sha256 of {name}", True, f"{digest[:16]}...", "as pinned")
        else:
            checklist.skip(f"sha256 of {name}", f"{digest[:16]}..., no hash is pinned")
    if weights.quantised:
        checklist.skip("every value, bit for bit", "a quantised .gguf, not the release's safetensors")
        return
    loaded, same = network.state_dict(), []
    for file in (release.path / name for name in release.sha256 if name.endswith(".safetensors")):
        for name, values in raw_tensors(file):
            mine = loaded["model.embed_tokens.weight" if name == "lm_head.weight" else name]
            if torch.equal(mine.view(torch.int32), values.view(torch.int32)):
                same.append(name)
    wrong = [name for name in weights.tensors if name not in same]
    measured = f"{len(same)} of {len(weights.tensors)} tensors"
    checklist.row("every value, bit for bit", not wrong, measured, "all", wrong[:5])


def raw_tensors(path):
    """
    Yield (name, values in fp32) from a safetensors file. This reads the published layout without the library: the
    length of the header (8 bytes, little-endian), the header (JSON), the values.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            dtype = next((dtype for dtype, kind in TYPE_NAMES.items() if kind == entry.get("dtype")), None)
            if dtype is not None:
                begin, end = (start + offset for offset in entry["data_offsets"])
                yield name, torch.frombuffer(bytearray(content[begin:end]), dtype=dtype).view(entry["shape"]).float()


def check_values(checklist, reference, copy):
    """
    Check that every value of the copy is within the rounding of its type. reference: {name: fp32 tensor}.
    Returns the largest error, in units of that rounding.
    """
    common = [name for name in reference if name in copy.tensors and copy.tensors[name].shape == reference[name].shape]
    unknown = [name for name in common if copy.quantised and copy.types[name] not in PRECISION]
    if unknown:
        types = ", ".join(dict.fromkeys(copy.types[name] for name in unknown))
        checklist.skip(f"values of {len(unknown)} tensors", f"the rounding of {types} is not known here")
        common = [name for name in common if name not in unknown]
    wrong, worst = [], 0.0
    for name in common:
        precision = PRECISION.get(copy.types[name], EXACT)
        expected = reference[name].reshape(-1, precision.block)
        error = copy.tensors[name].float().reshape(expected.shape) - expected
        allowed = precision.error * expected.abs().amax(1, keepdim=True)  # relative to the largest value of each block
        allowed += 2**-25 * (copy.types[name] == "F16")  # F16 has a smallest step, which it uses below 6e-5
        ratio = (error.abs() / allowed).masked_fill(error == 0, 0.0)  # where both are 0, there is no error
        bad = (~(ratio <= 1)).sum().item()  # written so that NaN counts as bad
        if bad:
            share = error.norm() / expected.norm()
            wrong.append(f"{name}: {bad:,} of {error.numel():,} values, off by {share:.0e}")
        worst = max(worst, ratio.nan_to_num(torch.inf).max().item())
    if unknown and not common:
        return worst
    types = ", ".join(dict.fromkeys(copy.types[name] for name in common))
    notes = wrong[:5] + [f"and {len(wrong) - 5} more tensors"] * (len(wrong) > 5)
    measured = f"worst {worst:.2g} x its rounding"
    checklist.row(f"every value, as {types} rounds it", not wrong and bool(common), measured, "within 1", notes)
    return worst


def check_network(checklist, mine, reference, idx, precision):
    """Compare hidden states, logits, argmax and NLL. mine, reference: (states, logits), as trace returns them."""
    (states, logits), (expected_states, expected) = mine, reference
    errors = {name: ((states[name] - h).norm() / h.norm()).item() for name, h in expected_states.items()}
    wrong = [name for name, error in errors.items() if not error <= precision.hidden]  # NaN counts as wrong
    worst = wrong[0] if wrong else max(errors, key=errors.get)
    measured = f"first wrong at {worst}" if wrong else f"worst {errors[worst]:.1e}, {worst}"
    values = [f"{error:.0e}" for error in errors.values()]
    notes = [f"embed_tokens {values[0]}, norm {values[-1]}"]
    notes += [f"layers {i:>2} on  {'  '.join(values[1:-1][i : i + 10])}" for i in range(0, len(values) - 2, 10)]
    name = f"hidden states, {len(errors) - 2} layers (relative)"
    checklist.within(name, errors[worst], precision.hidden, measured, notes)

    T = idx.shape[1]
    error = largest_difference(logits, expected)
    checklist.within(f"logits at all {T:,} positions", error, precision.logits, f"largest difference {error:.1e}")
    chosen = expected.gather(1, logits.argmax(-1, keepdim=True))[:, 0]  # the reference's logit of my argmax
    same = (chosen >= expected.amax(-1) - EXACT.logits).sum().item()  # a tie counts as the same
    bound = f"at least {precision.argmax:.0%}"
    checklist.row("argmax token", same >= precision.argmax * T, f"the same at {same:,} of {T:,}", bound)
    nll, expected_nll = mean_nll(logits, idx), mean_nll(expected, idx)
    measured = f"{nll:.6f} and {expected_nll:.6f}"
    checklist.within("mean NLL, nats per token (relative)", abs(nll / expected_nll - 1), precision.nll, measured)


def check_decoding(checklist, release, network, oracle, idx, logits):
    """Compare greedy decoding with the oracle's, and cached decoding with the logits (T, V) of a full pass over idx."""
    real = network.config.vocab_size >= VOCAB_SIZE
    prompt = torch.tensor([PROMPT]) if real else idx[:, :3]
    T = min(512, idx.shape[1])
    n = min(16, max(1, T // 16), network.config.max_position_embeddings - 3)
    ids = [new.item() for new in network.generate(prompt, n, temperature=0)]
    if oracle is None:
        checklist.skip(f"greedy text, {n} tokens", NO_TRANSFORMERS)
    else:
        expected = prompt
        for _ in range(n):  # without a cache, each token is computed from all earlier ones
            expected = torch.cat((expected, oracle(expected).logits[:, -1:].argmax(-1)), dim=1)
        same = next((i for i, (a, b) in enumerate(zip(ids, expected[0, 3:], strict=True)) if a != b), n)
        checklist.row(f"greedy text, {n} tokens", same == n, f"the first {same} are the same", "all")
    name = f"greedy ids after {PROMPT}"
    if BASE_SHA256 in (digest for digest, _ in release.sha256.values()):
        checklist.row(name, ids[:2] == CONTINUATION, f"{ids[:2]}", f"{CONTINUATION}")
    else:
        checklist.skip(name, "these weights are not the base release's")

    filled = T - n
    caches = [KVCache(T) for _ in network.model.layers]
    network.hidden(idx[:, :filled], caches)
    h = torch.cat([network.hidden(idx[:, t : t + 1], caches) for t in range(filled, T)], dim=1)[0]
    error = largest_difference(network.head(h), logits[filled:T])
    name = f"cached decoding, positions {filled} on"
    checklist.within(name, error, EXACT.logits, f"largest difference {error:.1e}")


def wrong_networks(config, tensors):
    """
    Yield (name, network): the same weights and shapes, with one thing wrong. The network is None if these heads make
    no difference. Use each network before drawing the next: the wrong activation is only in place until then.
    """
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, o = ([name for name in tensors if name.endswith(f"{part}_proj.weight")] for part in "qko")
    theta = config.rope_theta / 10
    yield f"rope_theta {theta:,.0f}", build(replace(config, rope_theta=theta), tensors)

    interleaved = {name: deinterleave(tensors[name], D) for name in q + k}  # RoPE rotates (2i, 2i + 1)
    yield "interleaved RoPE", build(config, tensors | interleaved)

    tiled = {n: tile_heads(tensors[n], 0, H, K) for n in q} | {n: tile_heads(tensors[n], 1, H, K) for n in o}
    yield "tiled KV heads", build(config, tensors | tiled) if 1 < K < H else None  # query head h uses KV head h % K

    with patch.object(F, "silu", F.gelu):
        yield "GELU for SiLU", build(config, tensors)

    network, middle = build(config, tensors), config.num_hidden_layers // 2
    network.model.layers[middle].input_layernorm = nn.Identity()
    yield f"no input_layernorm in layer {middle}", network


def check_controls(checklist, network, idx, expected):
    """Compare each wrong network with the reference's logits (T, V)."""
    T = min(512, idx.shape[1])  # a quarter of the text is enough
    idx, expected, bound = idx[:, :T], expected[:T], MARGIN * EXACT.logits
    nll = mean_nll(expected, idx)
    for name, wrong in wrong_networks(network.config, network.state_dict()):
        if wrong is None:
            checklist.skip(name, "the same network with these numbers of heads")
            continue
        logits = wrong(idx)[0]
        error = largest_difference(logits, expected)
        measured = f"fails: {error:.1e}, NLL {mean_nll(logits, idx) - nll:+.3f}"
        if not error >= bound:  # as with the small random weights of an untrained network, where any fault is small
            measured = f"passes: {error:.1e}, too small to tell"
        checklist.row(name, error >= bound, measured, f"above {bound:g}")


# ---------------------------------------------------------------------------------------------
# The three things to verify


def verify_model(checklist, release, tokens):
    """Check model.py with the release's weights."""
    network = load_network(release_source(release))  # strict: it ends the program if the weights do not fit
    weights = as_stored(release.path, network.config, release_tensors(release))
    checklist.heading("The files")
    check_files(checklist, release, weights, network)
    checklist.heading("The tensors")
    check_tensors(checklist, weights, release.asked in OF_135M)
    names = len(network.state_dict())
    checklist.row("strict load into model.py", True, f"{names} of {names} tensors", "all, and no other")

    idx, text = text_to_compare(network.config, tokens)
    oracle = transformers_network(release, weights.tensors)
    del weights  # frees half a gigabyte
    checklist.heading(f"model.py against {'transformers' if oracle else 'itself'}, in fp32", f"on {text}")
    mine = trace(network, idx)
    nll, chance, name = mean_nll(mine[1], idx), log(network.config.vocab_size), "mean NLL of the text, nats per token"
    if any(pinned for _, pinned in release.sha256.values()):
        checklist.row(name, nll <= 3.5, f"{nll:.4f} (chance: {chance:.2f})", "below 3.5")
    else:
        checklist.skip(name, f"{nll:.4f} (chance: {chance:.2f}); unknown weights")
    if oracle is None:
        expected = mine[1]
        for name in ("hidden states", "logits", "argmax token", "mean NLL"):
            checklist.skip(name, NO_TRANSFORMERS)
    else:
        reference = trace(oracle, idx)
        expected = reference[1]
        check_network(checklist, mine, reference, idx, EXACT)
        del reference
    check_decoding(checklist, release, network, oracle, idx, mine[1])
    del oracle, mine

    checklist.heading(f"Negative controls: each must miss the tolerance of the logits by a factor of {MARGIN}")
    check_controls(checklist, network, idx, expected)


def verify_copy(checklist, release, path, tokens):
    """Check another copy of the release's weights, in model.py."""
    source = find_weights(path)
    print(source.about)
    copy = as_stored(source.path, source.config, source.read())
    reference = load_network(release_source(release))
    config, tensors = reference.config, reference.state_dict()
    checklist.heading("The tensors of the copy")
    fits = check_tensors(checklist, copy, release.asked in OF_135M)
    copied, expected = asdict(copy.config), asdict(config)
    del copied["initializer_range"]  # only matters before training
    notes = [f"{name} is {copied[name]}, not {expected[name]}" for name in copied if copied[name] != expected[name]]
    measured = f"{len(copied) - len(notes)} of {len(copied)} settings"
    checklist.row("its config", not notes, measured, "all", notes)
    rounding = check_values(checklist, tensors, copy)

    idx, text = text_to_compare(config, tokens)
    oracle = transformers_network(release, tensors) or reference
    library = "model.py" if oracle is reference else "transformers"
    checklist.heading(f"The copy in model.py against the reference in {library}, in fp32", f"on {text}")
    loadable = {name: tensor for name, tensor in copy.tensors.items() if name != "lm_head.weight"}
    fits = fits and {n: t.shape for n, t in loadable.items()} == {n: t.shape for n, t in tensors.items()}
    if not fits or copy.config.max_position_embeddings < idx.shape[1]:
        checklist.skip("hidden states, logits, NLL", "the copy's tensors do not fit the network")
        return
    precision, kinds = EXACT, set(copy.types.values())
    unknown = sorted(kinds - PRECISION.keys()) if copy.quantised else []
    if rounding > 0 and not unknown:  # the coarsest type sets the tolerances
        known = [PRECISION[kind] for kind in kinds & PRECISION.keys()]
        precision = max(known, default=EXACT, key=lambda precision: (precision.hidden, precision.nll))
    if unknown or precision.hidden == inf:
        why = f"the rounding of {', '.join(unknown)} is not known here" if unknown else "a fault would not show in Q2_K"
        checklist.skip("hidden states, logits, NLL", why)
        return
    expected = trace(oracle, idx)
    del oracle, reference, tensors
    check_network(checklist, trace(build(copy.config, loadable), idx), expected, idx, precision)


def verify_checkpoint(checklist, path):
    """Check that the parts of a ckpt.pt agree. Reading it runs no code that it may contain."""
    checkpoint = read_checkpoint(path, resume=False)
    weights = as_stored(Path(path), checkpoint_config(path, checkpoint), checkpoint["model"])
    checklist.heading(f"{path}, iteration {checkpoint['iter_num']}")
    checklist.row("loads with weights_only=True", True, f"{len(checkpoint)} entries", "plain values")
    check_tensors(checklist, weights, False)
    checklist.row("finite weights", *all_finite(weights.tensors))
    states = list(checkpoint.get("optimizer", {}).get("state", {}).values())
    if not states:
        checklist.skip("finite moments, and one iteration", "no optimizer state: no step yet, or a best.pt")
        return
    moments = {f"{key} of parameter {i}": state[key] for i, state in enumerate(states) for key in state}
    checklist.row("finite moments", *all_finite(moments))
    steps = {int(state["step"]) for state in states}
    iterations = {checkpoint["iter_num"], checkpoint.get("scheduler", {}).get("last_epoch")} | steps
    measured = ", ".join(map(str, iterations))
    checklist.row("iteration: ckpt.pt, schedule, AdamW", len(iterations) == 1, measured, "one number")


def all_finite(tensors):
    """(ok, measured, bound, notes) of a row."""
    bad = [name for name, tensor in tensors.items() if not torch.as_tensor(tensor).isfinite().all()]
    return not bad, f"{len(tensors) - len(bad)} of {len(tensors)} tensors", "all", bad[:5]


@torch.no_grad()
def main(config):
    if config.weights and config.ckpt:
        reject("--weights and --ckpt cannot be combined: give one of them")
    if config.tokens < 2:
        reject(f"--tokens={config.tokens} leaves nothing to predict: give at least 2")
    checklist, tokens = Checklist(), min(config.tokens, 128) if config.quick else config.tokens
    if config.ckpt:
        subject = config.ckpt
        verify_checkpoint(checklist, config.ckpt)
    else:
        release = find_release(config.official)
        subject = config.weights or "model.py"
        print(describe(release))
        if config.weights:
            verify_copy(checklist, release, config.weights, tokens)
        else:
            verify_model(checklist, release, tokens)

    failed, skipped = checklist.count("✗"), checklist.count("skipped")
    print(f"\n{subject}: {checklist.count('✓')} ✓, {failed} ✗, {skipped} skipped")
    if config.json:
        try:
            with written_whole(config.json, "w", encoding="utf-8") as file:
                file.write(json.dumps(checklist.rows, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            sys.exit(f"error: {config.json} could not be written: {error.strerror}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(configure(VerifyConfig))
