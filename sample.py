"""
Write text: a checkpoint or the official weights go in, text comes out as it is made.

    python sample.py --out_dir=out/nano --prompt="The file"
    python sample.py --official=base --prompt="The capital of France is" --temperature=0
    python sample.py --official=instruct --chat=True --prompt="What is a palindrome?"
"""

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import checkpoint_model, read_checkpoint
from configurator import configure
from machine import pick_device, pick_matmul, try_compiling
from official import describe, find_release, load_model
from tokenizer import END_OF_TEXT, encode, load_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Sample from a trained checkpoint (by default out/ckpt.pt) or from the official weights."""

    out_dir: str = "out"  # sample from the checkpoint in this folder,
    ckpt: str = ""  # or from this ckpt.pt,
    official: str = ""  # or from a release: base, instruct, 360M, ..., wheel, hub:org/name, a folder, a .gguf
    prompt: str = "The"  # what the text begins with; empty for the start of a document
    chat: bool = False  # put the prompt as a user's question, as the Instruct releases expect
    num_samples: int = 1  # texts to write
    max_new_tokens: int = 200  # longest continuation
    temperature: float = 0.8  # 0 is greedy: the likeliest token, always
    top_k: int | None = 50  # choose among the k likeliest tokens
    top_p: float | None = None  # choose among the likeliest tokens that together reach p
    seed: int = 1337  # the same seed writes the same texts
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto measures
    compile: bool = False  # several seconds to start, then three times as fast: for long texts


def chat_ids(encoding, prompt):
    """A user's question in the Instruct releases' chat template, up to where the answer begins."""

    def turn(role, text):
        return [start, *encode(encoding, f"{role}\n{text}"), end, *encode(encoding, "\n")]

    start, end = (encoding.encode_single_token(name) for name in ("<|im_start|>", "<|im_end|>"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return [*turn("system", system), *turn("user", prompt), start, *encode(encoding, "assistant\n")]


def main(config):
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, "auto", device)
    torch.set_float32_matmul_precision(precision)
    if config.official:
        release = find_release(config.official)
        print(describe(release))
        model = load_model(release)
    else:
        path = Path(config.ckpt or Path(config.out_dir) / "ckpt.pt")
        checkpoint = read_checkpoint(path, mmap=True)
        print(f"checkpoint: {path}, iteration {checkpoint['iter_num']}, trained on {checkpoint['config']['dataset']}")
        model = checkpoint_model(checkpoint)
    model.to(device)
    for p in model.parameters():  # the weights themselves, for a token's time goes into reading them
        p.data = p.data.to(getattr(torch, dtype))

    encoding = load_tokenizer(config.official or "base")
    stop_ids = (END_OF_TEXT, encoding.encode_single_token("<|im_end|>"))
    ids = chat_ids(encoding, config.prompt) if config.chat else encode(encoding, config.prompt) or [END_OF_TEXT]
    idx = torch.tensor([ids], device=device)
    if config.compile:
        try_compiling(model, lambda: list(model.generate(idx, 3)), print)
    generator = torch.Generator(device).manual_seed(config.seed)
    for _ in range(config.num_samples):
        print(f"---\n{config.prompt}", end="\n" if config.chat else "", flush=True)
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
        start, count = time.perf_counter(), 0
        try:
            for new in model.generate(
                idx,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                stop_ids=stop_ids,
                generator=generator,
            ):
                count += 1
                if new.item() not in stop_ids:
                    print(utf8.decode(encoding.decode_single_token_bytes(new.item())), end="", flush=True)
        except ValueError as error:  # a prompt longer than the context
            sys.exit(f"error: the prompt is too long: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        seconds = time.perf_counter() - start
        print(f"\n--- {count} tokens in {seconds:.1f} s, {count / seconds:.0f} tok/s, {dtype} on {device}")


if __name__ == "__main__":
    main(configure(SampleConfig))
