"""
The same weights in another order. Reordering a matrix's rows or heads is exactly the same as computing with
another convention, so these serve GGUF files and two scripts that try the wrong conventions.

Shapes: w (heads * D, C) for q_proj and k_proj; H query heads, K key/value heads, D head dimension.
"""


def deinterleave(w, head_dim):
    """
    Row 2i of each head becomes row i, row 2i + 1 becomes row i + D/2: from llama.cpp's order of q and k, where
    RoPE rotates neighbours, to the release's half-split order. Applied to weights that are in half-split order
    already, it makes model.py compute interleaved RoPE.
    """
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleave(w, head_dim):
    """The inverse of deinterleave: from the release's order of q and k to llama.cpp's."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def tile_heads(w, dim, num_attention_heads, num_key_value_heads):
    """
    Query head j * K + k becomes head k * H/K + j, along `dim` of q_proj (0) or o_proj (1). Then model.py, where
    head h uses KV head h // (H/K), computes what a network would in which it uses KV head h % K.
    """
    H, K = num_attention_heads, num_key_value_heads
    return w.unflatten(dim, (H // K, K, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
