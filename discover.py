"""
How do you know? Official weights go in; every number of the architecture comes out, with its evidence.

    python discover.py                               the base release, or its stand-in from the wheel
    python discover.py --context=8192 --plot=True    read as far as the release does; draws out/discover.png
    python discover.py --official=my/folder          another release, a folder or a .gguf; 360M, 1.7B, ...

1. Names and shapes tell most numbers. config.json is not consulted: its claims are compared at the end.
2. Behaviour tells the rest. The same weights read the same text as rival networks would, each changed in one
   respect, and the network they were trained as predicts it best. Differences are paired, token by token. Their
   standard error (±) is that of the means of 32 tokens in a row, taken as independent: single tokens are not.
   It says what other text of this kind would give, and no more. So a rival is out when it is worse by two
   standard errors and by 0.001 nats: the rounding of bfloat16, in which the network was trained, moves the mean by
   as much. What is not out is "not told apart", and then the first public source that fits decides.
3. Proof: the 135M's config.json, written to out/ from what was found, has the sha256 of the official one.

Exit code 1 if the evidence contradicts the release's own config, or the proof fails.
"""

import hashlib
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
from official import SHA256, describe, find_release, load_state_dict, read_config
from tokenizer import VOCAB_SIZE, encode, load_tokenizer


@dataclass(frozen=True)
class DiscoverConfig:
    """Find a release's architecture from its weights alone, and compare what the public sources say."""

    official: str = "base"  # base, instruct, 360M, ..., wheel, hub:org/name, a folder, a .gguf
    tokens: int = 2_048  # of text, on which rival networks are compared
    context: int = 4_096  # last position read; 8192 tells theta 50,000 from 100,000, 12288 shows where it ends
    plot: bool = False  # draw the theta curve and NLL by position to out_dir/discover.png
    out_dir: str = "out"  # config.json and discover.png go here


# pretraining/smollm2/config_smollm2_135M.yaml of github.com/huggingface/smollm, its model_config: the first stage
# of the 135M's training.
TRAINING_YAML = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 2048,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
# Fields of the base config.json that no weight can tell. Taken as known: the first seven are the YAML's.
TAKEN_AS_KNOWN = {
    name: TRAINING_YAML[name]
    for name in (
        "bos_token_id", "eos_token_id", "initializer_range", "is_llama_config", "pretraining_tp", "rope_scaling",
        "use_cache",
    )
} | {
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
}  # fmt: skip
CONFIG_SHA256 = SHA256["HuggingFaceTB/SmolLM2-135M"]["config.json"]

GLANCE = 256  # tokens: enough to be rid of a network that cannot read at all
BLOCK = 32  # tokens in a row that count as one observation
FLOOR = 0.001  # nats per token: no difference below it is evidence
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
    """Shapes of a state dict; one line and out if it is not a network of model.py's kind."""
    extra = [name for name in tensors if name.endswith(".bias")]
    if extra:
        sys.exit(f"error: {release.path} has biases ({extra[0]}, ...), which model.py does not do")
    head = tensors.pop("lm_head.weight", None)  # some files repeat the tied head
    try:
        if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
            sys.exit(f"error: {release.path} has an lm_head.weight of its own: model.py ties it to embed_tokens")
        first = "model.layers.0."
        return Shapes(
            *tensors["model.embed_tokens.weight"].shape,
            len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
            len(tensors[first + "mlp.gate_proj.weight"]),
            len(tensors[first + "self_attn.q_proj.weight"]),
            len(tensors[first + "self_attn.k_proj.weight"]),
        )
    except KeyError as error:
        sys.exit(f"error: {release.path} has no tensor {error.args[0]}: it is not a Llama-style network")


def head_dims(shapes, claimed):
    """The head dimensions that divide both widths: multiples of 32, and those that a source claims."""
    candidates = sorted({*range(32, 257, 32), *(D for D in claimed if isinstance(D, int) and D > 0)})
    fitting = [D for D in candidates if D % 2 == 0 and shapes.q_width % D == 0 and shapes.kv_width % D == 0]
    fitting = [D for D in fitting if shapes.q_width // D % (shapes.kv_width // D) == 0]
    return fitting or sys.exit(f"error: q_proj {shapes.q_width} and k_proj {shapes.kv_width} wide share no head_dim")


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

    def __init__(self, release, shapes, tensors, ids):
        self.release, self.shapes, self.tensors, self.ids = release, shapes, tensors, ids
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
        try:
            model.load_state_dict(rearranged(self.tensors, config, network), assign=True)
        except RuntimeError as error:
            wrong = str(error).splitlines()[1].strip()
            sys.exit(f"error: the tensors in {self.release.path} are no network of model.py's kind: {wrong}")
        model.cos, model.sin = rope_tables(config, stop - start)
        with patch.object(F, "silu", ACTIVATIONS[network.hidden_act]):
            x = model.hidden(self.ids[None, start:stop])[0]  # (T, C)
        head = model.model.embed_tokens.weight
        chunks = zip(x.split(512), self.ids[start + 1 : stop + 1].split(512), strict=True)  # 100 MB of logits each
        return torch.cat([F.cross_entropy(F.linear(h, head), t, reduction="none") for h, t in chunks])


def model_config(shapes, network, length):
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

    def __str__(self):
        ratio = abs(self.mean) / self.error if self.error else 0.0
        return f"{self.mean:+.4f} ± {self.error:.4f}, {ratio:.1f} standard errors"


def paired(nll, other):
    d = nll - other
    blocks = d[: len(d) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
    return Difference(d.mean().item(), blocks.std().item() / sqrt(len(blocks)), len(d))


def search(reader, network, rivals, tokens, context):
    """
    Ask each question of `network`; where a rival reads better, go on with that one, until none does.
    rivals: {question, a field of Network: its values}. Returns (network, {question: {rival: Difference}}).
    """
    glance = (min(GLANCE, tokens), tokens)
    asked_of, differences = None, {}
    while asked_of != network:
        asked_of = network
        for question, values in rivals.items():
            # A rival that is out is read no further. Theta shows itself at a distance: what remains reads it all.
            lengths = (tokens, context) if question == "rope_theta" else glance
            differences[question] = {}
            for value in values:
                if value == getattr(network, question):
                    continue
                rival = network._replace(**{question: value})
                for n in lengths:
                    difference = paired(reader.nll(rival, n), reader.nll(network, n))
                    if difference.worse:
                        break
                differences[question][value] = difference
                verdict = "" if difference.worse else "better" if difference.better else "not told apart"
                nll = reader.nll(rival, n).mean()
                print(f"{question:<14}{show(value):>12}{nll:>9.4f}{n:>8,}  {difference}  {verdict}", flush=True)
            better = {value: d.mean for value, d in differences[question].items() if d.better}
            if better:
                network = network._replace(**{question: min(better, key=better.get)})
                print(f"{question} is {show(getattr(network, question))}, then: every question again, of that network")
    return network, differences


def read_onward(reader, network, tokens, context):
    """
    How far the network reads: each stretch beyond `tokens`, given all before it, beside the same stretch given
    only the last tokens/2 to tokens before it. Returns (how far without loss, the end of the first stretch with).
    """
    step = tokens // 2
    for start in range(tokens, context - step + 1, step):
        stop = start + step
        nll = reader.nll(network, context)[start:stop]
        near = reader.read(network, start - step, stop)[step:]
        difference = paired(nll, near)
        lost = difference.worse and difference.mean > LOSS
        verdict = "lost" if lost else "it helps" if difference.better else "no loss"
        print(f"{start:>7,} to {stop:>6,}{nll.mean():>9.4f}{near.mean():>9.4f}  {difference}  {verdict}", flush=True)
        if lost:
            return start, stop
    return context, None


# ---------------------------------------------------------------------------------------------
# What the public sources say, and what is found


def public_sources(release, shapes):
    """{source: the fields it states, or None}, in the order in which they are heard; the release's own comes first."""
    own = claims(release)
    if release.path.suffix == ".gguf":
        said = {"GGUF header": own, "config.json": None}
    else:
        said = {"config.json": own, "GGUF header": None}
        if shapes == SHAPES_135M and wheel_gguf():
            said["GGUF header"] = claims(find_release("wheel"))
    return said | {"training YAML": TRAINING_YAML if shapes == SHAPES_135M else None}


def claims(release):
    """What config.json, or a GGUF's header, says of each number: absent fields as transformers takes them."""
    config = read_config(release)
    try:
        heads = config["num_attention_heads"]
        return {
            "attention_bias": False,
            "tie_word_embeddings": False,
            "num_key_value_heads": heads,
            "head_dim": config["hidden_size"] // heads,
            "hidden_act": "silu",
            "rope_theta": (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0),
        } | {name: value for name, value in config.items() if value is not None}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        sys.exit(f"error: the config of {release.path} describes no network: {type(error).__name__}: {error}")


class Finding(NamedTuple):
    """One line of the table."""

    value: object
    remaining: object  # the values that the evidence leaves, a tuple or a range; None where it leaves any
    evidence: str
    picked_by: str = ""  # the source that decided among them

    def fits(self, claim):
        return claim is None or self.remaining is None or claim in self.remaining


def pick(name, best, remaining, sources, evidence):
    """A Finding: the value that the evidence leaves, or among several the first source's that is one of them."""
    finding = Finding(best, remaining, evidence)
    if remaining is not None and len(remaining) == 1:
        return finding
    for source, said in sources.items():
        if said and said.get(name) is not None and finding.fits(said[name]):
            return finding._replace(value=said[name], picked_by=source)
    return finding


def show(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1 else f"{value:g}"
    if isinstance(value, tuple):
        return " or ".join(map(show, value))
    return "-" if value is None else str(value)
