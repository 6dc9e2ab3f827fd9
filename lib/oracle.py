"""
Build models to compare model.py with: an independent implementation, and variants with one deliberate fault.

    oracle = build_oracle(config, tensors)                               # the same model in transformers
    wrong = build_variant(config, tensors, rope_layout="interleaved")    # model.py with a different RoPE
"""

import sys

import torch.nn.functional as F

from lib.gguf import deinterleave, tile_heads
from lib.weights import build, config_to_json

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def build_oracle(config, tensors=None, **settings):
    """
    Build transformers' LlamaForCausalLM for a ModelConfig: on the CPU, in fp32, with plain ("eager") attention.
    tensors: {name: tensor}, named as in the release (default: random weights). settings: override the LlamaConfig's.
    """
    try:
        import transformers
    except ImportError:
        sys.exit("error: model.py is compared with transformers, which is not installed: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = config_to_json(config) | dict(attn_implementation="eager") | settings
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    if tensors is not None:
        oracle.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return oracle


def build_variant(
    config, tensors, rope_layout="half-split", kv_grouping="repeated", gate="gate_proj", hidden_act="silu",
    norm_order="as named",
):  # fmt: skip
    """
    Build model.py's model with changes that tensor shapes do not show. Reordering rows, heads or matrices in the
    tensors is equivalent to reordering them in the computation.

    rope_layout  half-split: RoPE rotates the pairs (i, i + D/2); interleaved: (2i, 2i + 1)
    kv_grouping  repeated: query head h uses KV head h // (H/K); tiled: h % K
    gate         the matrix whose output goes through the activation: gate_proj or up_proj
    norm_order   swapped: input_layernorm comes before the MLP
    """
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    swaps = {"gate_proj": "up_proj", "up_proj": "gate_proj"} if gate == "up_proj" else {}
    if norm_order == "swapped":
        swaps |= {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    state = {}
    for name, w in tensors.items():
        *path, part, _ = name.split(".")
        if rope_layout == "interleaved" and part in ("q_proj", "k_proj"):
            w = deinterleave(w, D)
        if kv_grouping == "tiled" and part in ("q_proj", "o_proj"):
            w = tile_heads(w, 0 if part == "q_proj" else 1, H, K)
        state[".".join((*path, swaps.get(part, part), "weight"))] = w
    model = build(config, state)
    if hidden_act != "silu":
        act = ACTIVATIONS[hidden_act]
        for mlp in [block.mlp for block in model.model.layers]:
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))
    return model
