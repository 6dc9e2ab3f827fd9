"""
Write text: a checkpoint or any other weights go in, text comes out as it is made.

    python sample.py --out_dir=out/nano --prompt="The file"
    python sample.py --init_from=base --prompt="The capital of France is" --temperature=0
    python sample.py --init_from=instruct --chat=True --prompt="What is a palindrome?"
"""

import codecs
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import configure
from lib.chat import chat_ids
from lib.errors import one_line_errors
from lib.machine import pick_device, pick_matmul, try_compiling
from lib.tokenizer import END_OF_TEXT, encode, load_tokenizer
from lib.weights import find_weights, load_network


@dataclass(frozen=True)
class SampleConfig:
    """Sample from a trained checkpoint (by default out/ckpt.pt) or from other weights."""

    init_from: str = "resume"  # out_dir's ckpt.pt; or a release's name (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # where that ckpt.pt is
    prompt: str = "The"  # what the text begins with; empty for the start of a document
    chat: bool = False  # put the prompt as a user's question, as the Instruct releases expect
    num_samples: int = 1  # texts to write
    max_new_tokens: int = 200  # longest continuation
    temperature: float = 0.8  # 0 is greedy: always the likeliest token
    top_k: int | None = 50  # choose among the k likeliest tokens
    top_p: float | None = None  # choose among the likeliest tokens that together reach p
    seed: int = 1337  # the same seed writes the same texts
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto measures
    compile: bool = False  # several seconds to start, then three times as fast: for long texts


@one_line_errors("use --dtype=bfloat16, a shorter prompt or fewer samples")
def main(config):
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, "auto", device)
    torch.set_float32_matmul_precision(precision)
    source = find_weights(config.init_from, config.out_dir)
    print(source.about)
    model = load_network(source).to(device)
    for p in model.parameters():  # in bf16 the weights themselves, because decoding spends its time reading them
        p.data = p.data.to(getattr(torch, dtype))

    encoding = load_tokenizer(**source.tokenizer)
    stop_ids = (END_OF_TEXT, encoding.encode_single_token("<|im_end|>"))
    turn = [{"role": "user", "content": config.prompt}]
    ids = chat_ids(encoding, turn, True)[0] if config.chat else encode(encoding, config.prompt) or [END_OF_TEXT]
    idx = torch.tensor([ids], device=device)
    if config.compile:
        try_compiling(model, lambda: list(model.generate(idx, 3)), print)
    generator = torch.Generator(device).manual_seed(config.seed)
    for _ in range(config.num_samples):
        print(f"---\n{config.prompt}", end="\n" if config.chat else "", flush=True)
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
        settings = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        start, count = time.perf_counter(), 0
        try:
            for new in model.generate(idx, config.max_new_tokens, **settings, stop_ids=stop_ids, generator=generator):
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
