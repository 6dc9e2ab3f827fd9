"""
Read and write GGUF files with the release's tensor names. The gguf package handles the bytes.

    config = read_gguf_config(path)           # the header under config.json's names
    tensors = read_gguf_tensors(path)         # fp32, with the release's names and row order
    write_gguf(path, config, tensors, "Q8_0", tokenizer, special_ids, chat_template, name, description)
"""

import functools
import re

import gguf
import torch

from lib.errors import check, usable

DAMAGED_HINT = "download or convert it again"
RELEASE_NAMES = dict(  # llama.cpp's name = the release's name
    token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head", attn_norm="input_layernorm",
    attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj", attn_output="self_attn.o_proj",
    ffn_norm="post_attention_layernorm", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj",
)  # fmt: skip


@functools.cache  # it takes two seconds, mostly for the tokenizer's 98,052 strings
def open_gguf(path):
    """Return the gguf package's reader for a file. Exit if the file is damaged."""
    with usable(path, DAMAGED_HINT):
        return gguf.GGUFReader(path)


def read_header(path, key, hint=""):
    """Return a value from the header. If there is none, return None, or exit with the hint."""
    field = open_gguf(path).get_field(key)
    with usable(path, DAMAGED_HINT):
        value = field and field.contents()
    check(value is not None or not hint, f"{path} has no {key} in its header: {hint}")
    return value


def read_gguf_config(path):
    """Return the header as a dict with config.json's names. Exit if a key is missing that has no default."""
    optional = functools.partial(read_header, path)  # None if absent: config_from_json has llama.cpp's defaults
    header = functools.partial(read_header, path, hint=f"{DAMAGED_HINT}, or use a GGUF file of a Llama model")
    scaling = optional("llama.rope.scaling.type")
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
    """Return (special_ids, chat_template) from the header, in the form of a Source's."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: read_header(path, f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    ids = {name: i for name, i in ids.items() if i is not None}
    return ids, read_header(path, "tokenizer.chat_template") or ""


def read_gguf_tensors(path):
    """Return {name: tensor}, dequantized to fp32, with the rows of q and k in the release's order, not llama.cpp's."""
    config = read_gguf_config(path)
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config["num_key_value_heads"] or heads["attn_q"]
    tensors = {}
    for tensor in open_gguf(path).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        block, part = match.groups() if match else (None, None)
        with usable(path, f"the gguf package does not read {tensor.tensor_type.name}"):
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if part in heads and len(values) % (2 * heads[part]) == 0:  # otherwise load_model refuses the shape
            values = deinterleave(values, len(values) // heads[part])
        prefix = f"model.layers.{block}." if block else ""
        known = part in RELEASE_NAMES  # load_model refuses unknown names, such as a bias
        tensors[f"{prefix}{RELEASE_NAMES[part]}.weight" if known else tensor.name] = values
    return tensors


def read_gguf_types(path):
    """Return the type of each stored tensor (F32, Q4_1, ...), in the order of read_gguf_tensors."""
    return [tensor.tensor_type.name for tensor in open_gguf(path).tensors]


def write_gguf(path, config, tensors, kind, tokenizer, special_ids, chat_template, name, description):
    """
    Write a model to a file for llama.cpp. Raise OSError if that fails; exit if its rows do not fit this kind.

    config: ModelConfig; tensors: {name: floating-point tensor} with the release's names; kind: F32, F16, BF16 or Q8_0,
    for the matrices only: norms stay F32; tokenizer: SmolLM2's tokenizer.json, a dict, perhaps with more tokens, up to
    config.vocab_size; special_ids, chat_template: a Source's; name, description: for people to read.
    """
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]  # llama.cpp needs a token for each row of the embedding
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
        key_length=config.head_dim, value_length=config.head_dim,  # llama.cpp's default is hidden_size / heads
        rope_dimension_count=config.head_dim, context_length=config.max_position_embeddings,
        rope_freq_base=config.rope_theta, layer_norm_rms_eps=config.rms_norm_eps,
        tokenizer_model="gpt2", tokenizer_pre="smollm", token_list=tokens, token_types=types,
        token_merges=[m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        unk_token_id=0, add_bos_token=False, add_space_prefix=False,
    )  # fmt: skip
    for key, i in special_ids.items():
        header[key] = i[0] if isinstance(i, list) else i  # llama.cpp finds more end tokens by their names
    if chat_template:
        header["chat_template"] = chat_template
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in header.items():
        getattr(writer, f"add_{key}")(value)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        width, block = tensor.shape[-1], gguf.GGML_QUANT_SIZES[stored][0]
        fault = f"{name} has rows of {width} values, but {kind} stores {block} at a time"
        check(width % block == 0, f"{fault}: write F32, F16 or BF16")
        if ".q_proj." in name or ".k_proj." in name:
            # undo deinterleave
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        values = gguf.quantize(tensor.float().contiguous().numpy(), stored)
        writer.add_tensor(names.get_name(name, [".weight"]), values, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# ---- Row orders. Reordering rows or heads of a matrix is equivalent to computing with a different convention, and
# lib/oracle.py uses this to try the wrong ones. w: (heads * D, C), with D the head dimension.


def deinterleave(w, head_dim):
    """Move row 2i of each head to row i and 2i + 1 to i + D/2, from llama.cpp's order of q and k to the release's."""
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def tile_heads(w, dim, H, K):
    """
    Move query head j * K + k to head k * H/K + j, along `dim` of q_proj (0) or o_proj (1). Then model.py, where head h
    of H uses KV head h // (H/K) of K, computes the same as a model that uses KV head h % K.
    """
    return w.unflatten(dim, (H // K, K, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
