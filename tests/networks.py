"""Build small models with transformers, with large weights that show differences, and files that hold them."""

import hashlib
import json
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lib.checkpoint import write_checkpoint
from lib.tokenizer import tokenizer_json
from lib.weights import Source, find_weights, load_model
from model import ModelConfig, SmolLM2

LLAMA = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def llama(seed=0, **changes):
    """Return a small model of transformers, with large weights that show differences."""
    from transformers import LlamaConfig, LlamaForCausalLM  # here, because torture.py does not need it

    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    network = LlamaForCausalLM(LlamaConfig(**LLAMA | {"rope_parameters": rope} | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data.normal_(mean=float(p.dim() == 1), std=0.2, generator=generator)
    return network


def save(folder, network=None, **settings):
    (network or llama()).save_pretrained(folder, **settings)
    return folder


def assert_same_logits(source, network):
    """Assert that the model of a Source, or of a path, computes the logits of a transformers model."""
    source = source if isinstance(source, Source) else find_weights(str(source))
    idx = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_model(source)(idx), network(idx).logits, atol=1e-4, rtol=0)


def refusal(call, *args):
    """Return the one-line error of a call that exits."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


def say(*turns):
    """Return a conversation as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def write(path, content):
    """Write a str or bytes to a file, and return its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def permute(weight, heads):
    """Return q's or k's rows in llama.cpp's order, as its converter computes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, network, kind="F32", extra=(), without=(), header=()):
    """
    Write a .gguf as llama.cpp's converter does, with matrices of type `kind`, and return its path. network: from
    transformers or model.py. extra: more tensors, (name, tensor). without, header: fields to omit, or to change.
    """
    config = network.config
    theta = config.rope_theta if hasattr(config, "rope_theta") else config.rope_parameters["rope_theta"]
    writer = gguf.GGUFWriter(path, "llama")
    fields = dict(
        vocab_size=config.vocab_size, embedding_length=config.hidden_size, block_count=config.num_hidden_layers,
        feed_forward_length=config.intermediate_size, head_count=config.num_attention_heads,
        head_count_kv=config.num_key_value_heads, rope_dimension_count=config.head_dim,
        context_length=config.max_position_embeddings, rope_freq_base=theta,
        layer_norm_rms_eps=config.rms_norm_eps,
    )  # fmt: skip
    for name, value in (fields | dict(header)).items():
        if name not in without:
            getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, p in network.named_parameters():
        values = p.detach()
        if "q_proj" in name or "k_proj" in name:
            values = permute(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stored = gguf.GGMLQuantizationType[kind if p.dim() == 2 else "F32"]  # the norms stay
        values = gguf.quantize(values.contiguous().numpy(), stored)
        writer.add_tensor(names.get_name(name, [".weight"]), values, raw_dtype=stored)
    for name, values in extra:
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def load_tokenizer_once(monkeypatch, prepare_data, encoding):
    """Let prepare_data.py use this encoding, and read tokenizer.json only once in a test."""
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda: encoding)
    monkeypatch.setattr(prepare_data, "tokenizer_json", cache(tokenizer_json))


def load(path):
    """Return the model in a folder or a file."""
    return load_model(find_weights(str(path)))


def write_dataset(folder, train=range(40), val=range(20), mask=None, **more):
    """Write a small dataset in prepare_data.py's format. mask: repeated over each split, for conversations."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"name": folder.name, "dtype": "uint16", "vocab_size": 50, "sources": {"what": "my/notes.txt"}}
    for split, ids in (("train", train), ("val", val)):
        content = np.array(ids, dtype="<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        meta[split] = dict(tokens=len(ids), bytes=3 * len(ids), documents=1, sha256=sha256)
        if mask:
            content = bytes(mask * len(ids))[: len(ids)]
            (folder / f"{split}_mask.bin").write_bytes(content)
            meta[split] |= dict(loss_tokens=sum(content), mask_sha256=hashlib.sha256(content).hexdigest())
    (folder / "meta.json").write_text(json.dumps(meta | more))
    return meta


def save_checkpoint(folder, network, chat=False, **settings):
    """Save a SmolLM2 to folder/ckpt.pt, as train.py does after iteration 7. Return the model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = vars(network.config) | {"dataset": "text"} | settings
    state = dict(model=network.state_dict(), optimizer={}, scheduler={}, iter_num=7, best_val_loss=1.0, config=config)
    write_checkpoint(folder / "ckpt.pt", state | dict(data={}, chat=chat, machine={}))
    return network


def tiny(seed=0, **shapes):
    """Return a small SmolLM2 with the real vocabulary and random weights."""
    torch.manual_seed(seed)
    small = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    return SmolLM2(ModelConfig(**small | shapes))
