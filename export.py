"""
Weights go in; a Hugging Face folder comes out, which transformers, vLLM and others load, or a GGUF file for llama.cpp.

    python export.py                                             # out/ckpt.pt -> out/export/
    python export.py --init_from=out/best.pt --dtype=bfloat16    # half the size, the release's own dtype
    python export.py --format=gguf --dtype=q8_0                  # out/ckpt.pt -> out/export.gguf, a quarter of the size
    python export.py --to=my_model --push=me/my_model            # and to the Hub

A text begins and ends with the tokens that these weights were taught, and a chat model brings its chat template. The
folder says "LlamaForCausalLM", so model.py must be one: a network whose tensors or logits are not those of a Llama is
refused.
"""

import json
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import configure
from lib.checkpoint import read_checkpoint
from lib.errors import first_line, one_line_errors, reject, way_out
from lib.files import put_in_place, temporary
from lib.log import read_log
from lib.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_json
from lib.weights import config_to_json, find_weights, load_network


@dataclass(frozen=True)
class ExportConfig:
    """Write weights as a Hugging Face folder (config.json, model.safetensors, tokenizer files) or as a GGUF file."""

    init_from: str = "resume"  # out_dir's ckpt.pt; or a release's name (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # where that ckpt.pt is
    format: Literal["hf", "gguf"] = "hf"  # a Hugging Face folder, or one file for llama.cpp
    to: str = ""  # the folder or .gguf to write; by default `export` or `export.gguf` in out_dir
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # of the weights in the file; q8_0: gguf only
    push: str = ""  # org/name: also upload it to this repository of the Hub


GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def llama_shapes(config):
    """{name: shape} of LlamaForCausalLM with a tied head, written out here so that a changed model.py is noticed."""
    C, D = config.hidden_size, config.head_dim
    Q, K, I = config.num_attention_heads * D, config.num_key_value_heads * D, config.intermediate_size  # noqa: E741
    block = {
        "input_layernorm": (C,),
        "self_attn.q_proj": (Q, C),
        "self_attn.k_proj": (K, C),
        "self_attn.v_proj": (K, C),
        "self_attn.o_proj": (C, Q),
        "post_attention_layernorm": (C,),
        "mlp.gate_proj": (I, C),
        "mlp.up_proj": (I, C),
        "mlp.down_proj": (C, I),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, C), "model.norm.weight": (C,)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def check_tensors_are_llamas(model):
    """End the program with one line if the network has other tensors than a Llama."""
    expected = llama_shapes(model.config)
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | here.keys()):
        if here.get(name) != expected.get(name):
            found = f"is {list(here[name])}" if name in here else "is missing"
            wanted = list(expected[name]) if name in expected else "no such tensor"
            sys.exit(f"error: {name} {found}, but a Llama has {wanted}: model.py was changed, so export.py must be too")


@torch.no_grad()
def check_logits_are_llamas(path):
    """
    End the program with one line if transformers computes other logits from the folder or .gguf. Returns what to print.
    """
    try:
        import transformers
    except ImportError:
        return "not compared with transformers, which is not installed: pip install transformers"
    transformers.logging.disable_progress_bar()
    model = load_network(find_weights(str(path)))
    if path.is_dir():
        how = dict(dtype=torch.float32, attn_implementation="eager")
        peer = transformers.LlamaForCausalLM.from_pretrained(path, **how)
    else:  # transformers reads a GGUF only with accelerate; it gets the weights that we read from the file
        settings = transformers.LlamaConfig(**config_to_json(model.config), attn_implementation="eager")
        peer = transformers.LlamaForCausalLM(settings).eval()
        peer.model.load_state_dict({name.removeprefix("model."): t for name, t in model.state_dict().items()})
    T = min(64, model.config.max_position_embeddings)
    idx = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(idx), peer(idx).logits
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 1e-4:  # written so that NaN counts as wrong; equal networks differ by about 1e-6
        sys.exit(
            f"error: transformers' Llama computes other logits from these weights (relative error {error:.1e}): "
            "model.py was changed, so export.py must be too"
        )
    return f"transformers computes the same logits: relative error {error:.1e} on {T} tokens"


def token_names(source, tokenizer):
    """{"bos_token": "<|im_start|>", ...} for a source's special_ids. Ends the program with one line if one is none."""
    tokens = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    if max(tokens) >= source.config.vocab_size:
        rows = f"{source.path} has a vocabulary of {source.config.vocab_size:,}"
        sys.exit(f"error: {rows}, but its tokenizer has {max(tokens) + 1:,} tokens: it needs a smaller one")
    names = {"unk_token": tokens[END_OF_TEXT]}
    for name, i in source.special_ids.items():
        ends = i if name == "eos_token_id" and isinstance(i, list) and i else [i]  # several may end a text
        if any(type(end) is not int or end not in tokens for end in ends):
            sys.exit(f"error: {source.path} says {name} = {i!r}, which is no token: write a token's id there")
        names[name.removesuffix("_id")] = tokens[ends[0]]
    return names


def facts(source, run, config):
    """{what: value} about the weights and, for a checkpoint (else run is {}), about the run that made them."""
    network, settings = source.config, run.get("config", {})
    parameters = sum(math.prod(shape) for shape in llama_shapes(network).values())
    rows = {"parameters": f"{parameters:,}", "blocks": f"{network.num_hidden_layers} of {network.hidden_size}"}
    rows |= {"context": f"{network.max_position_embeddings:,} tokens", "weights": config.dtype}
    rows["began as"] = settings.get("init_from", "unknown") if run else config.init_from
    if run:
        rows |= {"trained on": settings.get("dataset", "unknown"), "iteration": f"{run['iter_num']:,}"}
        for row in read_log(source.path.parent / "log.csv"):
            if int(row["iter"]) == run["iter_num"] and row.get("val_loss"):
                rows["val loss"] = f"{float(row['val_loss']):.4f} nats per token"
    return rows


def model_card(name, rows, chat, run):
    """README.md of the folder: what the weights are, how to load them, how they were trained."""
    text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n| | |\n|---|---|\n"
    text += "".join(f"| {what} | {value} |\n" for what, value in rows.items())
    ids = 'tokenizer("The", return_tensors="pt")'
    if chat:
        ids = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
    text += f"""
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = {ids}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
```
"""
    if run:
        here = ("out_dir", "data_dir", "overwrite")  # they say nothing about the weights
        settings = "\n".join(f"{name} = {value!r}" for name, value in run["config"].items() if name not in here)
        text += f"\nnanoSmolLM's train.py trained it with these settings:\n\n```python\n{settings}\n```\n"
    return text


def write_folder(folder, source, model, dtype, content, names, card):
    """The Hugging Face folder. content: of tokenizer.json; names: of the special tokens; card: README.md."""
    settings = config_to_json(source.config, mlp_bias=False, torch_dtype=dtype, **source.special_ids)
    tokenizer = names | dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    tokenizer["model_max_length"] = source.config.max_position_embeddings
    if source.chat_template:  # here, where every version of transformers, and llama.cpp's converter, look for it
        tokenizer["chat_template"] = source.chat_template
    model.to(getattr(torch, dtype))
    folder.mkdir()
    # The names in model.py are the release's, and the tied head is left out, as in the release.
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name, fields in (("", settings), ("generation_", source.special_ids), ("tokenizer_", tokenizer)):
        (folder / f"{name}config.json").write_text(json.dumps(fields, indent=2) + "\n")
    # safetensors lets nobody but the owner read its file
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


@one_line_errors("close other programs, or use a larger machine")
def main(config):
    gguf = config.format == "gguf"
    path = Path(config.to or Path(config.out_dir) / ("export.gguf" if gguf else "export"))
    if gguf != (path.suffix == ".gguf"):
        reject(f"--to={path} with --format={config.format}: a GGUF file's name ends in .gguf, a folder's does not")
    if config.dtype == "q8_0" and not gguf:
        reject("--dtype=q8_0 is a type of GGUF files: add --format=gguf, or take --dtype=bfloat16")
    if path.exists():
        sys.exit(f"error: {path} is there already: move it away, or give another with --to=")
    if config.push:
        from lib.official import check_push, push  # the Hub's client, imported only when needed

        check_push(config.push)

    source = find_weights(config.init_from, config.out_dir)
    print(source.about)
    run = read_checkpoint(source.path, mmap=True, resume=False) if source.path.suffix == ".pt" else {}
    load_tokenizer(**source.tokenizer)  # checks it
    content, _ = tokenizer_json(**source.tokenizer)
    tokenizer = json.loads(content)
    names = token_names(source, tokenizer)
    model = load_network(source)
    check_tensors_are_llamas(model)
    rows = facts(source, run, config)

    unfinished = temporary(path)  # a folder: what is in it has its final name, and is checked there
    written = unfinished / path.name
    try:
        unfinished.mkdir(parents=True)
        if gguf:
            from lib.gguf import write_gguf

            about = ", ".join(f"{what}: {value}" for what, value in rows.items())
            taught = (tokenizer, source.special_ids, source.chat_template)
            write_gguf(written, source.config, model.state_dict(), GGUF_TYPES[config.dtype], *taught, path.stem, about)
        else:
            card = model_card(config.push or path.name, rows, source.chat_template, run)
            write_folder(written, source, model, config.dtype, content, names, card)
        compared = check_logits_are_llamas(written)
        for file in [written] if gguf else written.iterdir():
            with open(file, "rb+") as whole:
                os.fsync(whole.fileno())
        put_in_place(written, path)
    except (OSError, SafetensorError) as error:  # numpy and safetensors say nothing of the cause, a full disk
        advice = way_out(error) if getattr(error, "errno", None) else "free some disk, or use another folder"
        sys.exit(f"error: {path} could not be written ({first_line(error)}): {advice} with --to=")
    finally:
        with suppress(OSError):
            shutil.rmtree(unfinished)
    size = sum(file.stat().st_size for file in ([path] if gguf else path.iterdir()))
    print(f"{path}: {rows['parameters']} parameters, {config.dtype}, {size / 1e6:,.0f} MB")
    print(compared)
    how = f"llama-cli -m {path}" if gguf else f'transformers.AutoModelForCausalLM.from_pretrained("{path}")'
    print(f"to load: {how}, or sample.py --init_from={path}")
    if config.push:
        print(f"uploaded to {push(path, config.push)}")


if __name__ == "__main__":
    main(configure(ExportConfig))
