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
SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt"}  # of files of weights, when they have one
OTHERS = {  # files of weights that are not read here: what reads them
    ".onnx": "ONNX", ".msgpack": "Flax", ".h5": "TensorFlow", ".tflite": "TensorFlow Lite", ".mlpackage": "Core ML",
}  # fmt: skip


def first_bytes(path, n):
    """The first n bytes of a file; b"" if it cannot be read: who needs all of it will say so."""
    if not os.path.isfile(path):  # a pipe would wait for a writer, for ever
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(n)
    except OSError:
        return b""


def is_gguf(path):
    return first_bytes(path, 4) == b"GGUF"


def is_torch(path):
    """Whether torch.save wrote the file (or it is another zip)."""
    return first_bytes(path, len(LEGACY)).startswith((b"PK\x03\x04", LEGACY))


def is_safetensors(path):
    """Whether the file begins with the length of a header (8 bytes) and then the header, a JSON object."""
    head = first_bytes(path, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def is_shard(path):
    """Whether a file's name says that it is one of several: model-00001-of-00002.safetensors."""
    return bool(re.search(r"-\d+-of-\d+\.", Path(path).name))


def stand_in(path):
    """What lies in a file's place, and how to get the file itself, as the end of a sentence; "" if it is the file."""
    path, head = Path(path), first_bytes(path, 512)
    if head.startswith(b"version https://git-lfs"):
        folder = shlex.quote(str(path.parent))
        return f"a Git LFS pointer, not the file that it stands for: git -C {folder} lfs pull"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file that it is named after: download it again"
    words = re.fullmatch(rb"[A-Z][\x21-\x7e]* [\x20-\x7e]*\s*", head)  # such as the Hub's "Entry not found"
    if words and path.suffix.lower() in SUFFIXES | {".json"}:
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
        return f"is a Trainer's output folder: its newest checkpoint is --init_from={numbered[max(numbered)]}"
    if (folder / "ckpt.pt").exists():
        return f"is the folder of a run: its weights are --init_from={folder / 'ckpt.pt'}"
    usable = {".gguf", ".safetensors"} if (folder / "config.json").exists() else {".gguf"}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in usable and not is_shard(file):
            return f"holds no model.safetensors, but it holds {file.name}: --init_from={file}"
    for file in sorted([*folder.glob("*"), *folder.glob("onnx/*")]):
        if reader := OTHERS.get(file.suffix.lower()):
            return f"holds weights for {reader} alone ({file.name}): name the network from which they were converted"
    return ""


def what_adapter(folder):
    """The end of a sentence about a folder with an adapter_config.json: what it is, and the command that merges it."""
    config = read_json(folder / "adapter_config.json", "copy the adapter there again")
    names = ("peft_type", "base_model_name_or_path", "model")
    kind, base, mlx_base = (" ".join(str(config.get(name)).split()) for name in names)
    merged = f"{folder}-merged"
    if "lora_parameters" in config and "peft_type" not in config:
        command = shlex.join(["mlx_lm.fuse", "--model", mlx_base, "--adapter-path", str(folder), "--save-path", merged])
        return f"is a LoRA adapter that MLX made, not a whole network: {command}, then --init_from={merged}"
    what = f"is {'a LoRA adapter' if kind == 'LORA' else f'an adapter ({kind})'} of {base}, not a whole network"
    if re.search("PROMPT|PREFIX|P_TUNING|CPT", kind):
        return f"{what}, and it cannot be merged into one: name {base}"
    code = (
        "from peft import AutoPeftModelForCausalLM as Model; "
        f"Model.from_pretrained({json.dumps(str(folder))}).merge_and_unload().save_pretrained({json.dumps(merged)})"
    )
    command = shlex.join(["python", "-c", code])
    if (folder / "tokenizer.json").exists():
        command += " && " + shlex.join(["cp", str(folder / "tokenizer.json"), merged])
    return f"{what}: merge it (pip install peft) with {command}, then --init_from={merged}"
