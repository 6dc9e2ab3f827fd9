"""
Write weights as a Hugging Face folder, which transformers, vLLM and others load, or as a GGUF file for llama.cpp.

    python export.py                                             # out/ckpt.pt -> out/export/
    python export.py --init_from=out/best.pt --dtype=bfloat16    # half the size, the release's own dtype
    python export.py --format=gguf --dtype=q8_0                  # out/ckpt.pt -> out/export.gguf, a quarter of the size

The export carries the special tokens that these weights were trained with and, for a chat model, its chat template.
It gets its final name only after transformers has computed the same logits from it as model.py. To upload a folder:
`hf upload org/name out/export`.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from configurator import check_used, configure

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.checkpoint import read_checkpoint
from lib.errors import check, first_line, one_line_errors, reject, suggest_fix, usable
from lib.files import lock_folder, put_in_place
from lib.gguf import RELEASE_NAMES, write_gguf
from lib.oracle import build_oracle
from lib.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_json
from lib.weights import config_to_json, find_weights, load_model


@dataclass(frozen=True)
class ExportConfig:
    """Write weights as a Hugging Face folder (config.json, model.safetensors, tokenizer files) or as a GGUF file."""

    init_from: str = "resume"  # "resume" (out_dir's ckpt.pt), a release (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # folder with that ckpt.pt
    base: str = ""  # weights that a LoRA adapter was trained on (default: the ones named in its config)
    tokenizer: Literal["", "base"] = ""  # "base": use SmolLM2's own tokenizer, not the one next to the weights
    format: Literal["hf", "gguf"] = "hf"  # a Hugging Face folder, or one file for llama.cpp
    to: str = ""  # folder or .gguf to write (default: `export` or `export.gguf` in out_dir)
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # dtype of the saved weights; q8_0: gguf only

    def __post_init__(self):
        check_used(self, self.init_from == "resume" or not self.to, "without --init_from=resume", "out_dir")


@torch.no_grad()
def check_logits(path):
    """Exit if transformers computes different logits from it than model.py. Return a line to print."""
    try:
        import transformers
    except ImportError:
        return "not compared with transformers, which is not installed: pip install transformers"
    transformers.logging.disable_progress_bar()
    model = load_model(find_weights(str(path)))
    if path.is_dir():
        oracle = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    else:  # transformers needs accelerate to read a GGUF, so it gets the weights that we read from the file
        oracle = build_oracle(model.config, model.state_dict())
    T = min(64, model.config.max_position_embeddings)
    idx = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    expected = oracle(idx).logits
    error = ((model(idx) - expected).norm() / expected.norm()).item()
    fault = f"transformers' Llama computes different logits (relative error {error:.1e})"
    check(error < 1e-4, f"{fault}: model.py is no longer a Llama")  # also fails for NaN; equal models differ by 1e-6
    difference = f"relative error {error:.1e}" if error else "identical"
    return f"transformers computes the same logits on {T} tokens: {difference}"


def name_tokens(source, tokenizer):
    """Return {"bos_token": "<|im_start|>", ...} for a source's special_ids. Exit if one is not a token."""
    tokens = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    names = {"unk_token": tokens[END_OF_TEXT]}
    with usable(source.path, "its tokenizer and its special ids must fit its vocabulary"):
        if max(tokens) >= source.config.vocab_size:
            raise ValueError(f"its tokenizer has {max(tokens) + 1:,} tokens, its model {source.config.vocab_size:,}")
        for name, i in source.special_ids.items():
            ids = i if name == "eos_token_id" and isinstance(i, list) else [i]  # there may be several end tokens
            if any(type(i) is not int or i not in tokens for i in ids):
                raise ValueError(f"{name} = {i!r} is not a token")
            names[name.removesuffix("_id")] = tokens[ids[0]]
    return names


def write_card(path, name, rows, run):
    """Write README.md, the model card. rows: {label: value}; run: the checkpoint, or {}."""
    text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n| | |\n|---|---|\n"
    text += "".join(f"| {label} | {value} |\n" for label, value in rows.items())
    if run:
        omitted = ("out_dir", "data_dir", "overwrite")  # irrelevant to the weights
        settings = "\n".join(f"{name} = {value!r}" for name, value in run["config"].items() if name not in omitted)
        text += f"\nnanoSmolLM's train.py trained it with these settings:\n\n```python\n{settings}\n```\n"
    path.write_text(text, encoding="utf-8")


def write_folder(folder, source, model, dtype, content, names):
    """Write the Hugging Face folder. content: tokenizer.json's bytes; names: from name_tokens."""
    settings = config_to_json(source.config, mlp_bias=False, torch_dtype=dtype, **source.special_ids)
    tokenizer = names | dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    tokenizer["model_max_length"] = source.config.max_position_embeddings
    if source.chat_template:  # every version of transformers, and llama.cpp's converter, find it here
        tokenizer["chat_template"] = source.chat_template
    folder.mkdir()
    # The names in model.py are the release's, and the tied head is left out, as in the release.
    save_file(model.to(getattr(torch, dtype)).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(content)
    for name, fields in (("", settings), ("generation_", source.special_ids), ("tokenizer_", tokenizer)):
        (folder / f"{name}config.json").write_text(json.dumps(fields, indent=2) + "\n")
    # safetensors makes its file readable for the owner only
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


@one_line_errors("close other programs, or use a larger machine")
def main(config):
    gguf = config.format == "gguf"
    path = Path(config.to or Path(config.out_dir) / ("export.gguf" if gguf else "export"))
    if gguf != (path.suffix == ".gguf"):
        reject(f"--to={path} with --format={config.format}: a GGUF file's name ends in .gguf, a folder's does not")
    if config.dtype == "q8_0" and not gguf:
        reject("--dtype=q8_0 is for GGUF files: add --format=gguf, or use --dtype=bfloat16")
    check(not path.exists(), f"{path} exists already: move it away, or choose a different --to=")

    source = find_weights(config.init_from, config.out_dir, config.base, config.tokenizer)
    print(source.about)
    run = read_checkpoint(source.path, mmap=True, resume=False) if source.source == "checkpoint" else {}
    load_tokenizer(**source.tokenizer)  # checks it
    content, _ = tokenizer_json(**source.tokenizer)
    tokenizer = json.loads(content)
    names = name_tokens(source, tokenizer)
    model = load_model(source)
    parts = {re.sub(r"^model\.layers\.\d+\.", "", name).removesuffix(".weight") for name in model.state_dict()}
    for part in parts ^ (set(RELEASE_NAMES.values()) - {"lm_head"}):
        sys.exit(f"error: {part} is in only one of model.py and transformers' Llama: model.py is no longer a Llama")
    # q8_0 stores a float16 for every 32 values: the largest / 127
    stored, scale = (torch.float16, 1 / 127) if config.dtype == "q8_0" else (getattr(torch, config.dtype), 1)
    for name, tensor in model.state_dict().items():
        if not (gguf and tensor.dim() == 1) and not (tensor * scale).to(stored).isfinite().all():
            value = f"{name} has the value {tensor.abs().max():.3g}"
            sys.exit(f"error: {value}, which does not fit {config.dtype}: use --dtype=bfloat16, or float32")
    rows = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}", "dtype": config.dtype}
    if run:
        rows |= {"trained on": run["config"].get("dataset", "unknown text"), "iteration": f"{run['iter_num']:,}"}
        if run["best_val_loss"] < math.inf:
            rows["best val loss"] = f"{run['best_val_loss']:.4f} nats per token"
    else:
        rows["weights"] = source.title

    locked = Path(f"{path}.unfinished")
    unfinished = locked / "files"  # files are written and checked here, under their final names
    written = unfinished / path.name
    with lock_folder(locked, "to"):
        shutil.rmtree(unfinished, ignore_errors=True)  # left by an export that was killed
        try:
            unfinished.mkdir()
            if gguf:
                about = ", ".join(f"{label}: {value}" for label, value in rows.items())
                specials = (source.special_ids, source.chat_template)
                kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[config.dtype]
                write_gguf(written, source.config, model.state_dict(), kind, tokenizer, *specials, path.stem, about)
            else:
                write_folder(written, source, model, config.dtype, content, names)
                write_card(written / "README.md", path.name, rows, run)
            comparison = check_logits(written)
            for file in [written] if gguf else written.iterdir():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
            put_in_place(written, path)
        except (OSError, SafetensorError) as error:  # numpy and safetensors do not report the cause, a full disk
            hint = suggest_fix(error) if getattr(error, "errno", None) else "free some space, or use a different folder"
            sys.exit(f"error: {path} could not be written ({first_line(error)}): {hint} with --to=")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in ([path] if gguf else path.iterdir()))
    print(f"wrote {path}: {rows['parameters']} parameters, {config.dtype}, {size / 1e6:,.0f} MB")
    print(comparison)
    quoted = shlex.quote(str(path))
    call = f"llama-cli -m {quoted}" if gguf else f"transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})"
    print(f"to load: {call}, or python sample.py --init_from={quoted}")


if __name__ == "__main__":
    main(configure(ExportConfig))
