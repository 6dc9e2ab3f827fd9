"""
Write text or talk: a checkpoint or any other weights go in, text comes out as it is made.

    python sample.py --out_dir=out/nano --prompt="The file"
    python sample.py --init_from=base --prompt="The capital of France is" --temperature=0
    python sample.py --init_from=instruct --chat=True        # a conversation; /reset, /system TEXT, /exit
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
from lib.terminal import converse, read_prompt
from lib.tokenizer import END_OF_TEXT, encode, known_ids, load_tokenizer
from lib.weights import find_weights, load_network


@dataclass(frozen=True)
class SampleConfig:
    """Sample from a trained checkpoint (by default out/ckpt.pt) or from other weights."""

    init_from: str = "resume"  # out_dir's ckpt.pt; or a release's name (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # where that ckpt.pt is
    prompt: str | None = None  # what the text begins with; - reads standard input, @FILE a file; by default "The"
    chat: bool = False  # the prompt is a user's question; without a prompt, a conversation in the terminal
    system: str = ""  # chat: the system's message; by default the release's own
    num_samples: int = 1  # texts to write, all at the same time
    max_new_tokens: int = 200  # longest continuation
    temperature: float | None = None  # 0 is greedy: always the likeliest token; by default 0.8, in chat 0.2
    top_k: int | None = None  # choose among the k likeliest tokens, 0 for all; by default 50, in chat 0
    top_p: float | None = None  # choose among the likeliest tokens that together reach p; by default 1, in chat 0.9
    repetition_penalty: float = 1.0  # above 1, tokens that are in the text already become less likely
    seed: int = 1337  # the same seed writes the same texts
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto measures
    compile: bool = False  # several seconds to start, then three times as fast: for long texts

    def __post_init__(self):
        usual = dict(temperature=0.2, top_k=0, top_p=0.9) if self.chat else dict(temperature=0.8, top_k=50, top_p=1.0)
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the way to set a field of a frozen dataclass
        limits = dict(num_samples=(1, 2**20), max_new_tokens=(1, 2**31), temperature=(0, 100), top_k=(-1, 2**31))
        limits |= dict(top_p=(0, 1), repetition_penalty=(0.01, 100))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:  # NaN is in no range
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a number from {low:g} to {high:g}")


@one_line_errors("use --dtype=bfloat16, a shorter prompt or fewer samples")
def main(config):
    talk = config.chat and config.prompt is None
    prompt = read_prompt("The" if config.prompt is None else config.prompt)
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, device)
    torch.set_float32_matmul_precision(precision)
    source = find_weights(config.init_from, config.out_dir)
    print(source.about)
    model = load_network(source).to(device)
    for p in model.parameters():  # in bf16 the weights themselves, because decoding spends its time reading them
        p.data = p.data.to(getattr(torch, dtype))
    if config.compile:
        try_compiling(model, lambda: list(model.generate(torch.tensor([[END_OF_TEXT]], device=device), 3)), print)

    encoding = load_tokenizer(**source.tokenizer)
    stop_ids = (END_OF_TEXT, encoding.encode_single_token("<|im_end|>"))
    settings = dict(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        repetition_penalty=config.repetition_penalty, stop_ids=stop_ids,
        known=torch.tensor(known_ids(encoding, model.config.vocab_size), device=device),
        generator=torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip

    def write(ids, rows=1):
        """Continue the ids `rows` times, yielding the new text of each row, a list of str, token by token."""
        new_decoder = codecs.getincrementaldecoder("utf-8")  # a character may span several tokens
        utf8 = [new_decoder(errors="replace") for _ in range(rows)]
        for new in model.generate(torch.tensor([ids] * rows, device=device), **settings):
            tokens = [b"" if i in stop_ids else encoding.decode_single_token_bytes(i) for i in new.tolist()]
            yield [decoder.decode(token) for decoder, token in zip(utf8, tokens, strict=True)]

    context = model.config.max_position_embeddings
    if talk:
        return converse(encoding, config.system, context - min(config.max_new_tokens, context // 2), write)
    if config.chat:
        system = [{"role": "system", "content": config.system}] if config.system else []
        ids, _ = chat_ids(encoding, [*system, {"role": "user", "content": prompt}], generation_prompt=True)
    else:
        ids = encode(encoding, prompt) or [END_OF_TEXT]
    if len(ids) > context:
        sys.exit(f"error: the prompt is too long: {len(ids)} tokens do not fit a context of {context}")
    begin = f"---\n{prompt}" + "\n" * config.chat
    texts, count, start = [begin] * config.num_samples, 0, time.perf_counter()
    try:
        if config.num_samples == 1:
            print(begin, end="", flush=True)
        for parts in write(ids, config.num_samples):
            count += len(parts)
            texts = [text + part for text, part in zip(texts, parts, strict=True)]
            if config.num_samples == 1:
                print(parts[0], end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    seconds = time.perf_counter() - start
    print("" if config.num_samples == 1 else "\n".join(texts))
    print(f"--- {count} tokens in {seconds:.1f} s, {count / seconds:.0f} tok/s, {dtype} on {device}")


if __name__ == "__main__":
    main(configure(SampleConfig))
