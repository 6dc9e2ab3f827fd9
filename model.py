"""
SmolLM2, a Llama-style language model, in one file.

Notable features:
- RMSNorm before attention and MLP (pre-norm), and once more before the head
- rotary position embeddings (RoPE) with theta 100,000, in the half-split layout
- grouped-query attention (GQA): 9 query heads share 3 key/value heads
- SwiGLU in the MLP
- the head is tied to the embedding; no biases anywhere
- every matrix starts with a standard deviation of 1/24

    model = SmolLM2(ModelConfig())         # the shape of SmolLM2-135M, random weights
    logits = model(idx)                    # (B, T) -> (B, T, V)
    loss = model(idx, targets)             # mean cross-entropy in nats per token
    for ids in model.generate(idx, 100):   # one (B,) tensor of new ids at a time

`python model.py` prints the parameter table. Modules are named as in the release, so its state dict loads with
strict=True and no key map.

References: SmolLM2 arXiv 2502.02737, Llama 2302.13971, RMSNorm 1910.07467, RoPE 2104.09864, GQA 2305.13245, SwiGLU
2002.05202, tied embeddings 1608.05859. The release: https://huggingface.co/HuggingFaceTB/SmolLM2-135M

Shapes in comments: B batch, T time, C hidden size, H query heads, K key/value heads, D head dimension,
V vocabulary, S positions in the KV cache.
"""

import functools
import math
import platform
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """The model's settings, named as in the release's config.json. The defaults are SmolLM2-135M."""

    vocab_size: int = 49_152  # number of token ids
    hidden_size: int = 576  # width of the residual stream
    intermediate_size: int = 1_536  # width of the MLP
    num_hidden_layers: int = 30  # blocks
    num_attention_heads: int = 9  # query heads
    num_key_value_heads: int = 3  # key/value heads, each shared by an equal number of query heads
    head_dim: int = 64  # width of one head
    max_position_embeddings: int = 8_192  # context length: the longest sequence the model can read
    rope_theta: float = 100_000.0  # base of the rotary frequencies
    rms_norm_eps: float = 1e-5  # epsilon inside RMSNorm's square root
    initializer_range: float = 1 / 24  # standard deviation of the initial weights

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")


PRESETS = {
    "135M": ModelConfig(),
    "360M": ModelConfig(
        hidden_size=960, intermediate_size=2_560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5
    ),
    "1.7B": ModelConfig(
        hidden_size=2_048, intermediate_size=8_192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, rope_theta=130_000.0, initializer_range=0.02,
    ),
}  # fmt: skip


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, with the statistics in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear without a bias. It calls linear() below, which has a faster path for decoding one token."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


def rope_tables(config, length):
    """Return cos and sin of position * theta^(-2i/D), each (length, D/2) in fp32."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # (D/2,)
    angles = torch.outer(torch.arange(length).float(), 1.0 / config.rope_theta**exponents)  # (length, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """
    Rotate x (B, H, T, D) by its positions (RoPE), with tables (T, D/2). The pairs are (i, i + D/2), the "half-split"
    layout of the release. The other convention, pairs (2i, 2i + 1), is a different model with the same shapes.
    """
    x1, x2 = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each, in fp32 like the tables
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attend(q, k, v):
    """
    Causal attention: softmax(q k^T / sqrt(D)) v, with q (B, H, T, D) and k, v (B, K, S, D) -> (B, H, T, D).
    Query head h uses key/value head h // (H/K). The T queries belong to the last T of the S positions.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, K, H // K * T, D) * D**-0.5  # stack the query heads that share a key/value head
    scores = (q @ k.transpose(-2, -1)).view(B, K, H // K, T, S)
    if T > 1:
        position = torch.arange(S, device=q.device)
        scores = torch.where(position[S - T :, None] >= position, scores, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).view(B, K, H // K * T, S)  # the softmax itself is computed in fp32
    return (weights @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = Linear(C, config.num_attention_heads * D)
        self.k_proj = Linear(C, config.num_key_value_heads * D)
        self.v_proj = Linear(C, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, C)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        y = attention(q, k, v)  # (B, H, T, D), by attend() or one of its faster versions
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class SmolLM2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        # The head is tied: logits = x @ embed_tokens.weight.T, so there is no lm_head.
        self.activation_checkpointing = False  # True: store only each block's input, recompute the rest in backward
        self.compiled = False  # set by compile()
        cos, sin = rope_tables(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)  # computed, so not part of the state dict
        self.register_buffer("sin", sin, persistent=False)
        # Every matrix starts with the same std, as in the published recipe. GPT-2 scales o_proj and down_proj down by
        # sqrt(2 * layers); here that made no difference to the loss (LOG.md).
        for p in self.parameters():
            if p.dim() == 2:  # the norms keep their initial weight of one
                nn.init.normal_(p, mean=0.0, std=config.initializer_range)

    def hidden(self, idx, caches=None):
        """
        Return the final hidden states (B, T, C), after the last norm, of token ids (B, T).

        caches  one KVCache per layer. Positions continue after the cached ones; once a cache holds any, T must be 1.
        """
        past = caches[0].length if caches else 0
        T = idx.shape[1]
        if past + T > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + T} tokens do not fit a context of {self.config.max_position_embeddings} "
                "(max_position_embeddings)"
            )
        if past and T > 1:
            raise ValueError("with a filled cache, give one token at a time")
        cos, sin = self.cos[past : past + T], self.sin[past : past + T]  # (T, D/2)
        x = self.model.embed_tokens(idx)  # (B, T, C)
        for i, block in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None)
        return self.model.norm(x)

    def head(self, x):
        """Return the logits (..., V) of hidden states (..., C)."""
        return linear(x, self.model.embed_tokens.weight)

    def forward(self, idx, targets=None):
        """
        Return the logits (B, T, V) of token ids (B, T) int64. With targets (B, T), return the mean cross-entropy, a
        scalar in nats per token, in fp32. Targets of -1 are ignored. Raise ValueError if T exceeds
        max_position_embeddings.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        return cross_entropy(x.flatten(0, 1), self.model.embed_tokens.weight, targets.flatten(), self.compiled)

    def compile(self, by_block=True):
        """
        Compile in place, block by block: blocks share one compilation, so it takes seconds, not minutes, and DDP can
        overlap one block's all-reduce with the backward pass of the next. by_block=False compiles forward() as one.
        """
        # torch.compile writes C++ that is vectorized already. If GCC 12 vectorizes it again, transposed tiles of
        # bf16 can come out wrong, and gradients with them (seen on an Emerald Rapids CPU). So tell GCC not to.
        from torch._inductor.config import cpp  # here, because it takes a second to import

        if platform.system() == "Linux" and platform.machine() == "x86_64" and cpp.march is None:
            cpp.march = "native -fno-tree-slp-vectorize"
        if not by_block:
            return super().compile()
        for block in self.model.layers:
            block.compile()
        self.head = torch.compile(self.head)
        self.compiled = True

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop_ids=(),
        allowed=None, generator=None,
    ):  # fmt: skip
        """
        Continue idx (B, T) by up to max_new_tokens, yielding one (B,) tensor of new ids at a time.

        temperature         0 means greedy decoding (argmax)
        top_k               keep the k most likely tokens; 0 or less keeps all
        top_p               nucleus sampling: keep the smallest set of most likely tokens with a total probability of p
        repetition_penalty  divide the logits of ids in idx by this if positive, else multiply (arXiv 1909.05858)
        stop_ids            stop once every row has produced one of these; a finished row repeats its stop id
        allowed             (V,) bool: the ids that may be sampled (default: all)
        generator           torch.Generator to draw from, so sampling does not disturb other random numbers

        When the context (max_position_embeddings) is full, the older half of it is dropped.
        Raise ValueError if idx itself is longer than the context.
        """
        context = self.config.max_position_embeddings
        size = min(context, idx.shape[1] + max_new_tokens)
        caches = [KVCache(size) for _ in self.model.layers]
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        unread = idx  # ids that the model has not read yet
        for _ in range(max_new_tokens):
            if caches[0].length == context:  # full: read the newer half again, from position 0
                unread = idx[:, -(context - context // 2) :]
                caches = [KVCache(context) for _ in caches]
            x = self.hidden(unread, caches)[:, -1]  # (B, C)
            logits = self.head(x).float()  # (B, V)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -torch.inf)
            if repetition_penalty != 1:
                seen = logits.gather(1, idx)  # (B, T)
                seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
                logits = logits.scatter(1, idx, seen)
            new = sample_ids(logits, temperature, top_k, top_p, generator)  # (B,)
            new = torch.where(stopped, idx[:, -1], new)
            yield new
            for stop_id in stop_ids:
                stopped |= new == stop_id
            if stopped.all():
                return
            unread = new[:, None]
            idx = torch.cat((idx, unread), dim=1)


class KVCache:
    """The keys and values of one layer: up to `size` positions, filled from the left."""

    def __init__(self, size):
        self.size, self.length = size, 0
        self.k = self.v = None

    def append(self, k, v):
        """Append k, v (B, K, T, D) of the newest positions. Return all keys and values so far, (B, K, S, D) each."""
        if self.k is None:  # allocate on first use, when shape, dtype and device are known
            self.k, self.v = (x.new_empty(*x.shape[:2], self.size, x.shape[3]) for x in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def sample_ids(logits, temperature, top_k, top_p, generator):
    """Draw one id per row of logits (B, V). Return them, (B,)."""
    if temperature < 1e-6:  # dividing by less could overflow, and would pick the most likely id as well
        return logits.argmax(-1)
    return torch.multinomial(sampling_probs(logits / temperature, top_k, top_p), 1, generator=generator).squeeze(1)


def sampling_probs(logits, top_k, top_p):
    """Return the softmax of logits (B, V), with 0 for ids that top_k or top_p leaves out."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # the sum of all more likely tokens
        outside = (before >= top_p) & (before > 0)  # the most likely token always stays
        probs = probs.scatter(-1, order, sorted_probs.masked_fill(outside, 0.0))
    return probs


def parameter_table(config):
    """Return a table of parameter counts by module, as text, counted from the model's own tensors."""
    with torch.device("meta"):  # shapes without memory
        model = SmolLM2(config)
    embed_tokens, layers, norm = model.model.values()
    rows = [("embed_tokens (and tied head)", embed_tokens), ("one block", layers[0])]
    for part, module in layers[0].named_children():
        rows += [(f"  {part}", module), *((f"    {name}", matrix) for name, matrix in module.named_children())]
    rows += [(f"all {len(layers)} blocks", layers), ("norm", norm), ("total", model)]
    lines = []
    for name, module in rows:
        shape = " x ".join(f"{n:,}" for n in module.weight.shape) if hasattr(module, "weight") else ""
        count = sum(p.numel() for p in module.parameters())
        lines.append(f"{name:<32}{shape:>16}{count:>15,}")
    return "\n".join(lines) + f"   fp32 {4 * count / 1e6:,.0f} MB, bf16 {2 * count / 1e6:,.0f} MB"


# ---------------------------------------------------------------------------------------------
# The same, faster. Nothing below changes what the model computes, only how long it takes.


def linear(x, weight):
    """Return x (..., C) @ weight.T, weight (N, C) -> (..., N)."""
    if x.numel() == x.shape[-1] and torch.compiler.is_compiling():
        # One token is memory-bound: as multiply-and-sum, inductor reads the weights once, at full bandwidth.
        return (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def attention(q, k, v):
    """Return attend(q, k, v), by the fastest of three versions."""
    T = q.shape[2]
    if T > 512 or T > 1 and q.device.type != "cpu":
        return attend_long(q, k, v)
    if T == 1 and torch.compiler.is_compiling():
        return attend_one(q, k, v)
    return attend(q, k, v)


# Whether this CPU has Intel's matrix unit. With it, torch's fused attention is faster than the chunks below.
AMX = torch.cpu.get_capabilities().get("amx_bf16", False)


def attend_long(q, k, v):
    """attend() for long sequences, and on GPUs: without storing the (T, T) scores."""
    training = q.requires_grad and torch.compiler.is_compiling()
    if training and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not AMX:
        # 512 queries at a time against the keys they can see; checkpoint() recomputes the weights, to save memory
        ends = range(512, q.shape[2] + 512, 512)
        parts = [(q[:, :, end - 512 : end], k[:, :, :end], v[:, :, :end]) for end in ends]
        return torch.cat([checkpoint(attend, *part, use_reentrant=False) for part in parts], dim=2)
    if q.device.type != "cpu" and q.dtype != torch.bfloat16:  # outside bf16, only SDPA's slow kernel groups queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attend_one(q, k, v):
    """attend() for one query, as multiply-and-sum: inductor fuses it into one pass over the KV cache."""
    B, H, _, D = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, H // K, 1, D).float() * D**-0.5
    weights = (q * k[:, :, None].float()).sum(-1).softmax(-1)  # (B, K, H/K, S)
    return (weights[..., None] * v[:, :, None].float()).sum(-2).to(v.dtype).view(B, H, 1, D)


def cross_entropy(x, head, targets, compiled=False):
    """Return the mean cross-entropy of logits x @ head.T, in nats: x (N, C), head (V, C), targets (N,), -1 for none."""
    if x.device.type == "cpu":  # on a GPU, reading the count would force a sync
        kept = targets >= 0
        n = 64 * math.ceil(int(kept.sum()) / 64)  # a multiple of 64, because every new shape costs memory
        if n < len(x):  # ignored targets need no logits
            rows = kept.argsort(descending=True, stable=True)[:n]
            x, targets = x[rows], targets[rows]
    return ChunkedCrossEntropy.apply(x, head, targets, torch.is_grad_enabled(), compiled)


def softmax_loss(logits, targets):
    """Return -log softmax (n, 1) of logits (n, V) at targets (n, 1). Overwrite the logits with their gradient."""
    log_probs = logits.float().log_softmax(-1)
    at_target = log_probs.gather(1, targets)
    if torch.compiler.is_compiling():  # softmax - one-hot in one pass; a scatter would need a second
        one_hot = torch.arange(logits.shape[1], device=logits.device) == targets
        logits.copy_(log_probs.exp() - one_hot.float())
    else:
        logits.copy_(log_probs.exp_().scatter_(1, targets, at_target.exp() - 1))
    return -at_target


@functools.cache
def compile_softmax_loss():
    """Return softmax_loss compiled. Not at import: torch.compile alone takes two seconds to load."""
    return torch.compile(softmax_loss)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    F.cross_entropy(F.linear(x, head), targets) without materializing all the logits: forward goes chunk by chunk and
    computes each chunk's gradients while its logits exist. At V = 49,152 the logits of 16,384 tokens take 3.2 GB in
    fp32, and their gradient 3.2 GB more. Matmuls use autocast's dtype, the softmax and the sums fp32.
    """

    CHUNK = {"cpu": 512}  # tokens per matmul: 50 MB of logits in bf16, 100 in fp32
    ROWS = 32  # tokens per softmax if it is not compiled: 6 MB in fp32, which stay in the cache

    @staticmethod
    def forward(ctx, x, head, targets, with_grad, compiled):
        device = x.device.type
        compute_loss = compile_softmax_loss() if compiled else softmax_loss
        chunk = ChunkedCrossEntropy.CHUNK.get(device, 4_096)
        rows = ChunkedCrossEntropy.ROWS if device == "cpu" and not compiled else chunk
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = head.to(dtype)  # (V, C)
        kept = targets[:, None] >= 0  # (N, 1)
        targets = targets[:, None].clamp(0)  # (N, 1)
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x)
        dw = None if len(x) else torch.zeros_like(head)
        for i in range(0, len(x), chunk):
            h = x[i : i + chunk].to(dtype)  # (n, C)
            logits = F.linear(h, w)  # (n, V)
            t_chunk, k_chunk = targets[i : i + chunk], kept[i : i + chunk]  # (n, 1) each
            losses = [compute_loss(*part) for part in zip(logits.split(rows), t_chunk.split(rows), strict=True)]
            loss += (torch.cat(losses) * k_chunk).sum()
            if with_grad:
                dx[i : i + len(h)] = logits @ w * k_chunk
                dw_chunk = logits.T @ (h * k_chunk)  # (V, C)
                dw = dw_chunk.to(head.dtype) if dw is None else dw.add_(dw_chunk)
            logits = dw_chunk = None  # freed before the next chunk
        count = kept.sum().clamp(1)
        if with_grad:
            ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx.mul_(scale), dw.mul_(scale), None, None, None  # in place, so a second backward raises, as it should


if __name__ == "__main__":
    print(parameter_table(ModelConfig()))
