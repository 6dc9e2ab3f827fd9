"""
GGUF files, under the release's names. The gguf package reads and writes the bytes.

    config = read_gguf_config(path)           # the header, as a config.json would say it
    tensors = read_gguf_tensors(path)         # fp32, in the release's names and row order
    write_gguf(path, config, tensors, "Q8_0", tokenizer, special_ids, chat_template)    # as llama.cpp loads it

lib/tokenizer.py rebuilds tokenizer.json from a header.
"""

import functools
import re
import sys

import gguf
import numpy as np
import torch

from lib.errors import usable

AGAIN = "download or convert it again"

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
    """Return the gguf package's reader of a file. End the program with one line if the file is damaged."""
    with usable(path, AGAIN):
        return gguf.GGUFReader(path)


def header_value(path, key):
    """Return a value of the header, or None if it has none of that name."""
    field = open_gguf(path).get_field(key)
    with usable(path, AGAIN):
        return field and field.contents()


def read_gguf_config(path):
    """Return the header as a dict under config.json's names."""
    optional = functools.partial(header_value, path)  # None if absent: config_from_json has llama.cpp's defaults
    scaling = optional("llama.rope.scaling.type")

    def header(key):
        if (value := optional(key)) is None:
            sys.exit(f"error: {path} has no {key} in its header: {AGAIN}, or name a GGUF file of a Llama model")
        return value

    return {
        "model_type": header("general.architecture"),
        "vocab_size": optional("llama.vocab_size") or len(header("tokenizer.ggml.tokens")),
        "hidden_size": header("llama.embedding_length"),
        "intermediate_size": header("llama.feed_forward_length"),
        "num_hidden_layers": header("llama.block_count"),
        "num_attention_heads": header("llama.attention.head_count"),
        "num_key_value_heads": optional("llama.attention.head_count_kv"),
        "head_dim": optional("llama.rope.dimension_count") or optional("llama.attention.key_length"),
        "max_position_embeddings": header("llama.context_length"),
        "rope_theta": optional("llama.rope.freq_base"),
        "rope_scaling": None if scaling is None else {"type": "default" if scaling == "none" else scaling},
        "rms_norm_eps": float(f"{header('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # fp32 in the file
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in open_gguf(path).tensors),
    }


def read_gguf_specials(path):
    """Return (special_ids, chat_template) of the header, as a Source has them."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: header_value(path, f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special_ids = {name: i for name, i in found.items() if i is not None}
    return special_ids, header_value(path, "tokenizer.chat_template") or ""


def read_gguf_tensors(path):
    """
    Return {name: tensor}, dequantized to fp32. llama.cpp stores the rows of q and k interleaved; put them back into
    the release's order.
    """
    config = read_gguf_config(path)
    tensors = {}
    for tensor in open_gguf(path).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        block, part = match.groups() if match else (None, None)
        with usable(path, f"the gguf package does not read {tensor.tensor_type.name}"):
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        heads = config["num_attention_heads"]
        if part == "attn_k":
            heads = config["num_key_value_heads"] or heads
        if part in ("attn_q", "attn_k") and len(values) % (2 * heads) == 0:  # else load_network refuses the shape
            values = deinterleave(values, len(values) // heads)
        prefix = f"model.layers.{block}." if block else ""
        known = part in NAMES  # another name (a bias, say) stays as it is, for load_network to refuse
        tensors[f"{prefix}{NAMES[part]}.weight" if known else tensor.name] = values
    return tensors


def read_gguf_types(path):
    """Return [the type of each stored tensor: F32, Q4_1, ...], in the order of read_gguf_tensors."""
    return [tensor.tensor_type.name for tensor in open_gguf(path).tensors]


def write_gguf(path, config, tensors, kind, tokenizer, special_ids, chat_template, name, description):
    """
    Write a model to a file that llama.cpp loads. Raise OSError if the disk fails; end the program with one line if
    rows of this model cannot be of this kind.

    config: ModelConfig; tensors: {name: floating-point tensor} under the release's names; kind: F32, F16, BF16 or Q8_0,
    of the matrices, while norms stay F32; tokenizer: a tokenizer.json of SmolLM2's kind, a dict, with no more tokens
    than config.vocab_size; special_ids, chat_template: as a Source has them; name, description: for people to read.
    """
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]  # llama.cpp wants a token for each row of the embedding
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        control = gguf.TokenType.CONTROL if added.get("special", True) else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], control
    header = dict(
        type="model", name=name, description=description, quantization_version=gguf.GGML_QUANT_VERSION,
        file_type=gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")],
        vocab_size=config.vocab_size, embedding_length=config.hidden_size,
        feed_forward_length=config.intermediate_size, block_count=config.num_hidden_layers,
        head_count=config.num_attention_heads, head_count_kv=config.num_key_value_heads,
        key_length=config.head_dim, value_length=config.head_dim,  # llama.cpp would take hidden_size / heads
        rope_dimension_count=config.head_dim, context_length=config.max_position_embeddings,
        rope_freq_base=config.rope_theta, layer_norm_rms_eps=config.rms_norm_eps,
        tokenizer_model="gpt2", tokenizer_pre="smollm", token_list=tokens, token_types=types,
        token_merges=[m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        unk_token_id=0, add_bos_token=False, add_space_prefix=False,
    )  # fmt: skip
    for key, i in special_ids.items():
        header[key] = i[0] if isinstance(i, list) else i  # llama.cpp knows more ends by their names
    if chat_template:
        header["chat_template"] = chat_template
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in header.items():
        getattr(writer, f"add_{key}")(value)

    kinds = {name: gguf.GGMLQuantizationType[kind if t.dim() == 2 else "F32"] for name, t in tensors.items()}
    names = {release: llama_cpp for llama_cpp, release in NAMES.items()}
    for name, tensor in tensors.items():  # the header says where each tensor lies, so it is written before them
        number, part = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
        stored = f"blk.{number}.{names[part]}.weight" if number else f"{names[part]}.weight"
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        if tensor.shape[-1] % block:
            rows = f"{name} has rows of {tensor.shape[-1]} values"
            sys.exit(f"error: {rows}, but {kind} stores {block} at a time: write F32, F16 or BF16")
        size = tensor.numel() // block * block_bytes
        writer.add_tensor_info(stored, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            if ".q_proj." in name or ".k_proj." in name:
                tensor = interleave(tensor, config.head_dim)
            writer.write_tensor_data(gguf.quantize(tensor.float().contiguous().numpy(), kinds[name]))
    finally:
        writer.close()


# ---------------------------------------------------------------------------------------------
# Row orders. Reordering a matrix's rows or heads is exactly the same as computing with another convention, so verify.py
# and discover.py use these to try the wrong ones. w: (heads * D, C), D the head dimension.


def deinterleave(w, head_dim):
    """
    Move row 2i of each head to row i and row 2i + 1 to row i + D/2: from llama.cpp's order of q and k, where RoPE
    rotates neighbors, to the release's half-split order. Applied to weights that are in half-split order already, it
    makes model.py compute interleaved RoPE.
    """
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleave(w, head_dim):
    """Undo deinterleave: from the release's order of q and k to llama.cpp's."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def tile_heads(w, dim, num_attention_heads, num_key_value_heads):
    """
    Move query head j * K + k to head k * H/K + j, along `dim` of q_proj (0) or o_proj (1). Then model.py, where head h
    uses KV head h // (H/K), computes the same as a model in which it uses KV head h % K.
    """
    H, K = num_attention_heads, num_key_value_heads
    return w.unflatten(dim, (H // K, K, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
