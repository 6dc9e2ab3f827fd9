"""
A checkpoint goes in; a Hugging Face folder comes out, which transformers, vLLM, llama.cpp's converter and others load.

    python export.py                                          # out/ckpt.pt -> out/export/
    python export.py --ckpt=out/nano/ckpt.pt --to=my_model    # any checkpoint, any folder
    python export.py --dtype=bfloat16                         # half the size, as the release comes
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoint import checkpoint_model, read_checkpoint
from configurator import configure
from official import tokenizer_json
from tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as config.json, model.safetensors and tokenizer files."""

    ckpt: str = "out/ckpt.pt"  # the checkpoint
    to: str = ""  # the folder to write; by default `export` beside the checkpoint
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in the file


def main(config):
    folder = Path(config.to or Path(config.ckpt).parent / "export")
    if folder.exists():
        sys.exit(f"error: {folder} is there already: move it away, or give another with --to=")
    model = checkpoint_model(read_checkpoint(config.ckpt, mmap=True))
    # The names of model.py's tensors are the release's; the tied head is left out, as in the release.
    tensors = {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in model.state_dict().items()}
    settings = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", tie_word_embeddings=True)
    settings |= asdict(model.config) | dict(attention_bias=False, mlp_bias=False, torch_dtype=config.dtype)
    settings |= dict(bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT)
    end = "<|endoftext|>"
    tokenizer = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, unk_token=end)
    tokenizer |= dict(model_max_length=model.config.max_position_embeddings)
    content, _ = tokenizer_json()

    unfinished = folder.with_name(folder.name + ".tmp")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (unfinished / "tokenizer.json").write_bytes(content)
        (unfinished / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
        os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {folder} could not be written ({reason}): free some disk, or give another with --to=")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # there only if it is still unfinished
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.dtype}, {size / 1e6:,.0f} MB")
    print(f'to load: transformers.AutoModelForCausalLM.from_pretrained("{folder}"), or sample.py --official={folder}')


if __name__ == "__main__":
    main(configure(ExportConfig))
