"""
Write text or talk: a checkpoint or any other weights go in, text comes out as it is made.

    python sample.py --out_dir=out/nano --prompt="The file"
    python sample.py --init_from=base --prompt="The capital of France is" --temperature=0
    python sample.py --init_from=instruct --chat             # a conversation; /reset, /system TEXT, /exit
"""

import codecs
import contextlib
import importlib
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from configurator import check_used, configure

import torch

from lib.chat import SYSTEM, TEMPLATE, chat_ids
from lib.errors import one_line_errors, usable
from lib.machine import pick_device, pick_matmul, try_compiling
from lib.tokenizer import END_OF_TEXT, encode, known_ids, load_tokenizer
from lib.weights import find_weights, load_network

HELP = "/reset begins again, /system TEXT gives another system message, /exit or Ctrl-D ends, Ctrl-C ends a reply"


@dataclass(frozen=True)
class SampleConfig:
    """Sample from a trained checkpoint (by default out/ckpt.pt) or from other weights."""

    init_from: str = "resume"  # out_dir's ckpt.pt; or a release's name (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # where that ckpt.pt is
    base: str = ""  # LoRA adapters: the weights they were trained on; by default those their config names
    tokenizer: Literal["", "base"] = ""  # base: SmolLM2's own, in place of the one beside the weights
    prompt: str | None = None  # what the text begins with; - reads standard input, @FILE a file; by default "The"
    chat: bool = False  # the prompt is a user's question; without a prompt, a conversation in the terminal
    system: str = ""  # chat: the system's message; by default the template's own
    num_samples: int = 1  # texts to write, all at the same time
    max_new_tokens: int = 200  # longest continuation
    temperature: float | None = None  # 0 is greedy: always the most likely token; by default 0.8, in chat 0.2
    top_k: int | None = None  # choose among the k most likely tokens, 0 for all; by default 50, in chat 0
    top_p: float | None = None  # choose among the most likely tokens that together reach p; by default 1, in chat 0.9
    repetition_penalty: float = 1.0  # above 1, tokens that are in the text already become less likely
    seed: int = 1337  # the same seed writes the same texts
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto measures
    compile: bool = False  # several seconds to start, then three times as fast: for long texts

    def __post_init__(self):
        check_used(self, self.chat, "without --chat", "system")
        check_used(self, not self.chat or self.prompt is not None, "in a conversation without --prompt", "num_samples")
        check_used(self, self.init_from == "resume", "without --init_from=resume", "out_dir")
        usual = dict(temperature=0.2, top_k=0, top_p=0.9) if self.chat else dict(temperature=0.8, top_k=50, top_p=1.0)
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the way to set a field of a frozen dataclass


def read_prompt(prompt):
    """The text of --prompt=: - is standard input and @FILE a file, in UTF-8, without the newline at their ends."""
    if prompt != "-" and not prompt.startswith("@"):
        return prompt
    with usable("standard input" if prompt == "-" else prompt[1:], "give --prompt=@FILE a text file in UTF-8"):
        content = sys.stdin.buffer.read() if prompt == "-" else Path(prompt[1:]).expanduser().read_bytes()
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")


def question_ids(encoding, system, turns):
    """The ids of a conversation up to where the assistant's next message begins."""
    return chat_ids(encoding, [{"role": "system", "content": system}, *turns], generation_prompt=True)[0]


def remark(answer, last, count):
    """Return a note on an answer that was cut, or is empty. last: its last part, None if the network ended it."""
    empty = "" if answer.strip() else "[empty answer]"
    return empty if last is None else f" [cut at {count} tokens]"


def converse(encoding, system, limit, write):
    """
    Talk until /exit or the end of standard input. Each reply reads the whole conversation again, from its beginning: a
    second or two for a thousand tokens on a CPU.

    system  the system's message, until /system gives another
    limit   most ids that a conversation may have before a reply: beyond it, its oldest turns are forgotten
    write   function: ids -> yields the parts of the reply, lists of one str, [None] where the network ends it
    """
    with contextlib.suppress(ImportError):  # input() then has a history, and lines pasted together are one question
        importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print(HELP)
    turns, usual = [], system
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends the conversation)")
            continue
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        elif command == "/reset":
            turns = []
            print("(a new conversation)")
        elif command == "/system":
            system = rest.strip() or usual
            print(f"(the system's message is now: {system})")
        elif command[:1] == "/" and command[1:].isalpha():
            print(f"({command} is no command: {HELP})")
        elif line:
            kept = [*turns, {"role": "user", "content": line}]
            while len(ids := question_ids(encoding, system, kept)) > limit and len(kept) > 1:
                kept = kept[2:]  # without the oldest question and its answer
            if len(ids) > limit:
                print(f"(too long: {len(ids)} tokens with the system's message, and at most {limit} fit)")
                continue
            if forgotten := (len(turns) + 1 - len(kept)) // 2:
                print(f"(the context is full: {forgotten} of {len(turns) // 2} earlier turns are forgotten)")
            reply, count = "", 0
            try:
                for (part,) in write(ids):
                    count += 1
                    reply += part or ""
                    print(part or "", end="", flush=True)
                print(remark(reply, part, count))
            except KeyboardInterrupt:
                print(" (stopped)")
            turns = [*kept, {"role": "assistant", "content": reply}]


@one_line_errors("use --dtype=bfloat16, a shorter prompt or fewer samples")
def main(config):
    prompt = read_prompt("The" if config.prompt is None else config.prompt)
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, device)
    torch.set_float32_matmul_precision(precision)
    source = find_weights(config.init_from, config.out_dir, config.base, config.tokenizer)
    print(source.about)
    pattern = re.escape(TEMPLATE).replace(re.escape(SYSTEM), r"([^'\\]+)")  # in some copies it is another sentence
    template = re.fullmatch(pattern, str(source.chat_template).replace("\\n", "\n").strip())
    if config.chat and not template:
        fact = "have another template, but SmolLM2's is used" if source.chat_template else "were never trained to chat"
        print(f"note: these weights {fact}: answers may make little sense")
    system = config.system or (template[1] if template else SYSTEM)
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
        allowed=torch.tensor(known_ids(encoding, model.config.vocab_size), device=device),
        generator=torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip

    def write(ids, rows=1):
        """Continue the ids `rows` times. Yield each row's new text, token by token; None from where a row has ended."""
        new_decoder = codecs.getincrementaldecoder("utf-8")  # a character may span several tokens
        utf8 = [new_decoder(errors="replace") for _ in range(rows)]
        for new in model.generate(torch.tensor([ids] * rows, device=device), **settings):
            tokens = [None if i in stop_ids else encoding.decode_single_token_bytes(i) for i in new.tolist()]
            yield [token and decoder.decode(token) for decoder, token in zip(utf8, tokens, strict=True)]

    context = model.config.max_position_embeddings
    if config.chat and config.prompt is None:
        return converse(encoding, system, context - min(config.max_new_tokens, context // 2), write)
    if config.chat:
        ids = question_ids(encoding, system, [{"role": "user", "content": prompt}])
    else:
        ids = encode(encoding, prompt) or [END_OF_TEXT]
    if len(ids) > context:
        sys.exit(f"error: the prompt is too long: {len(ids)} tokens do not fit a context of {context}: shorten it")
    begin = f"---\n{prompt}" + "\n" * config.chat
    texts = [""] * config.num_samples
    count = 0
    start = time.perf_counter()
    print(begin, end="", flush=True)
    for parts in write(ids, config.num_samples):
        count += len(parts)
        texts = [text + (part or "") for text, part in zip(texts, parts, strict=True)]
        print(parts[0] or "", end="", flush=True)  # the first appears as it is written, the others afterwards
    seconds = time.perf_counter() - start
    remarks = [remark(text, last, config.max_new_tokens) * config.chat for text, last in zip(texts, parts, strict=True)]
    print(remarks[0], *(begin + text + end for text, end in zip(texts[1:], remarks[1:], strict=True)), sep="\n")
    print(f"--- {count} tokens in {seconds:.1f} s, {count / seconds:.0f} tok/s, {dtype} on {device}")


if __name__ == "__main__":
    main(configure(SampleConfig))
