"""
What a file or a folder of weights is, told by its content rather than by its name.

    is_gguf(path)                   # by its first bytes: Ollama's blobs have no suffix
    refuse_stand_in(path)           # ends the program where a Git LFS pointer or a web page lies in a file's place
    what_instead(folder)            # "is a LoRA adapter of ...: merge it with ...", for a folder that is no release
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

from lib.files import read_json

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save's before 1.6; today it writes a zip
OTHERS = {  # files of weights that are not read here: what reads them
    ".onnx": "ONNX", ".msgpack": "Flax", ".h5": "TensorFlow", ".tflite": "TensorFlow Lite", ".mlpackage": "Core ML",
}  # fmt: skip


def first_bytes(path, n):
    """The first n bytes of a file; b"" if there is no file, or something else of that name."""
    if not os.path.isfile(path):  # a pipe would wait for a writer, for ever
        return b""
    with open(path, "rb") as file:
        return file.read(n)


def is_gguf(path):
    return first_bytes(path, 4) == b"GGUF"


def is_torch(path):
    """Whether torch.save wrote the file (or it is another zip)."""
    return first_bytes(path, len(LEGACY)).startswith((b"PK\x03\x04", LEGACY))


def is_safetensors(path):
    """Whether the file begins with the length of a header (8 bytes) and then the header, a JSON object."""
    head = first_bytes(path, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def stand_in(path):
    """What lies in the place of a file, and how to get the file itself, as the end of a sentence; "" if nothing does."""
    head = first_bytes(path, 512)
    if head.startswith(b"version https://git-lfs"):
        folder = shlex.quote(str(Path(path).parent))
        return f"a Git LFS pointer, not the file that it stands for: git -C {folder} lfs pull"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file that it is named after: download it again"
    if len(head) < 512 and re.fullmatch(rb"[\w ,.'/-]+ [\w ,.'/-]+\s*", head):  # the Hub's "Entry not found", say
        return f'only the text "{head.decode().strip()}": download it again'
    return ""


def refuse_stand_in(path):
    """End the program with one line if something else lies in the place of a file of a release."""
    if found := stand_in(path):
        sys.exit(f"error: {path} is {found}")


def what_instead(folder):
    """What a folder is that holds no release, and the next command, as the end of a sentence; "" if unknown."""
    if (folder / "adapter_config.json").exists():
        return what_adapter(folder)
    numbered = {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name[11:].isdecimal()}
    if numbered:
        return (
            f"is a Trainer's output folder, with checkpoints in it: the newest is --init_from={numbered[max(numbered)]}"
        )
    if (folder / "ckpt.pt").exists():
        return f"is the folder of a run: its weights are --init_from={folder / 'ckpt.pt'}"
    for pattern in ("*.gguf", "*.GGUF", "*.safetensors") if (folder / "config.json").exists() else ("*.gguf", "*.GGUF"):
        for file in sorted(folder.glob(pattern)):
            if not re.search(r"-\d+-of-\d+\.", file.name):
                return f"holds no model.safetensors, but it holds {file.name}: --init_from={file}"
    for file in sorted([*folder.glob("*"), *folder.glob("onnx/*")]):
        if reader := OTHERS.get(file.suffix):
            return (
                f"holds its weights for {reader} alone ({file.name}): name the network from which they were converted"
            )
    return ""


def what_adapter(folder):
    """The end of a sentence about a folder with an adapter_config.json: what it is, and the command that merges it."""
    config = read_json(folder / "adapter_config.json", "copy the adapter there again")
    kind, merged = str(config.get("peft_type", "LORA")), f"{folder}-merged"
    if "lora_parameters" in config and "peft_type" not in config:
        command = ["mlx_lm.fuse", "--model", str(config.get("model")), "--adapter-path", str(folder)]
        return f"is a LoRA adapter of MLX: {shlex.join([*command, '--save-path', merged])}, then --init_from={merged}"
    what = f"is {'a LoRA' if kind == 'LORA' else f'an adapter ({kind})'}{' adapter' * (kind == 'LORA')}"
    what += f" of {config.get('base_model_name_or_path')}, not a whole network"
    if re.search("PROMPT|PREFIX|P_TUNING|CPT", kind):
        return f"{what}, and no weights can stand for it: name that network"
    code = (
        "from peft import AutoPeftModelForCausalLM as Model; "
        f"Model.from_pretrained({json.dumps(str(folder))}).merge_and_unload().save_pretrained({json.dumps(merged)})"
    )
    command = shlex.join(["python", "-c", code])
    if (folder / "tokenizer.json").exists():
        command += " && " + shlex.join(["cp", str(folder / "tokenizer.json"), merged])
    return f"{what}: merge it (pip install peft) with {command}, then --init_from={merged}"
