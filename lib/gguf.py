"""
GGUF files, read under the release's names. The gguf package reads the bytes.

    config = read_gguf_config(path)           # the header, as a config.json would say it
    tensors = read_gguf_tensors(path)         # fp32, in the release's names and row order

lib/tokenizer.py rebuilds tokenizer.json from a header.
"""

import functools
import re
import sys

import gguf
import torch

from lib.errors import first_line
from lib.layouts import deinterleave

NAMES = {  # llama.cpp's: the release's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@functools.cache  # two seconds, most of them for the tokenizer's 98,052 strings
def open_gguf(path):
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        sys.exit(f"error: {path} is not a whole GGUF file: {first_line(error)}")


def read_gguf_config(path):
    """The header as a dict under config.json's names."""
    reader = open_gguf(path)
    scaling = reader.get_field("llama.rope.scaling.type")

    def header(key):
        if (field := reader.get_field(key)) is None:
            sys.exit(f"error: {path} has no {key} in its header: only GGUF files of Llama networks are read")
        return field.contents()

    return {
        "model_type": header("general.architecture"),
        "vocab_size": header("llama.vocab_size"),
        "hidden_size": header("llama.embedding_length"),
        "intermediate_size": header("llama.feed_forward_length"),
        "num_hidden_layers": header("llama.block_count"),
        "num_attention_heads": header("llama.attention.head_count"),
        "num_key_value_heads": header("llama.attention.head_count_kv"),
        "head_dim": header("llama.rope.dimension_count"),
        "max_position_embeddings": header("llama.context_length"),
        "rope_theta": header("llama.rope.freq_base"),
        "rope_scaling": scaling and {"type": scaling.contents().replace("none", "default")},
        "rms_norm_eps": float(f"{header('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # fp32 in the file
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }


def read_gguf_tensors(path):
    """
    {name: tensor}, dequantised to fp32. llama.cpp stores the rows of q and k interleaved; here they are put back
    into the release's order.
    """
    config = read_gguf_config(path)
    tensors = {}
    for tensor in open_gguf(path).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        block, part = match.groups() if match else (None, None)
        try:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        except NotImplementedError:
            sys.exit(f"error: {path} is quantised to {tensor.tensor_type.name}, which the gguf package does not read")
        if part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            values = deinterleave(values, len(values) // heads)
        prefix = f"model.layers.{block}." if block else ""
        known = part in NAMES  # another name (a bias, say) stays as it is, for load_network to refuse
        tensors[f"{prefix}{NAMES[part]}.weight" if known else tensor.name] = values
    return tensors


def read_gguf_types(path):
    """[how each tensor is stored: F32, Q4_1, ...], in the order of read_gguf_tensors."""
    return [tensor.tensor_type.name for tensor in open_gguf(path).tensors]
