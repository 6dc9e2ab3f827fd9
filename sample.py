"""
Generate text, or chat, with a checkpoint or any released weights. Text is printed as it is sampled.

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
from lib.errors import check, one_line_errors, usable
from lib.machine import pick_device, pick_matmul, try_compiling
from lib.tokenizer import END_OF_TEXT, encode, list_known_ids, load_tokenizer
from lib.weights import find_weights, load_model

HELP = "/reset starts over, /system TEXT changes the system message, /exit or Ctrl-D quits, Ctrl-C stops a reply"


@dataclass(frozen=True)
class SampleConfig:
    """Sample from a trained checkpoint (by default out/ckpt.pt) or from other weights."""

    init_from: str = "resume"  # out_dir/ckpt.pt; or a release (base, instruct, ...), a folder, a .gguf, a .pt
    out_dir: str = "out"  # folder with ckpt.pt
    base: str = ""  # weights that a LoRA adapter was trained on (default: the ones named in its config)
    tokenizer: Literal["", "base"] = ""  # base: use SmolLM2's own tokenizer instead of the one next to the weights
    prompt: str | None = None  # start of the text; - reads standard input, @FILE reads a file (default: "The")
    chat: bool = False  # treat the prompt as a user's question; without a prompt, chat in the terminal
    system: str = ""  # system message of a chat (default: the chat template's)
    num_samples: int = 1  # number of samples, written in parallel
    max_new_tokens: int = 200  # maximum number of new tokens
    temperature: float | None = None  # 0 is greedy: always the most likely token (default: 0.8, with --chat 0.2)
    top_k: int | None = None  # sample from the k most likely tokens, 0 for all (default: 50, with --chat 0)
    top_p: float | None = None  # sample from the fewest tokens with total probability p (default: 1, with --chat 0.9)
    repetition_penalty: float = 1.0  # above 1, tokens that have already appeared become less likely
    seed: int = 1337  # the same seed gives the same samples
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # dtype of the weights; auto picks the faster one
    compile: bool = False  # compile the model: several seconds slower to start, then about 3x faster

    def __post_init__(self):
        check_used(self, self.chat, "without --chat", "system")
        check_used(self, not self.chat or self.prompt is not None, "in a conversation without --prompt", "num_samples")
        check_used(self, self.init_from == "resume", "without --init_from=resume", "out_dir")
        for name, default, in_chat in (("temperature", 0.8, 0.2), ("top_k", 50, 0), ("top_p", 1.0, 0.9)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, in_chat if self.chat else default)  # sets a field of a frozen dataclass


def read_prompt(prompt):
    """Return the text of --prompt. Read standard input for "-" or a file for "@FILE", less the last newline."""
    if prompt != "-" and not prompt.startswith("@"):
        return prompt
    path = "standard input" if prompt == "-" else prompt[1:]
    with usable(path, "pass --prompt=@FILE, a text file in UTF-8"):
        content = sys.stdin.buffer.read() if prompt == "-" else Path(path).expanduser().read_bytes()
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")


def question_ids(encoding, system, turns):
    """Return the ids of a conversation, up to the start of the assistant's next message."""
    return chat_ids(encoding, [{"role": "system", "content": system}, *turns], generation_prompt=True)[0]


def describe_end(answer, last_piece, count):
    """Return a note if an answer is empty or was cut off. last_piece: None if the model ended the answer itself."""
    if last_piece is not None:
        return f" [cut at {count} tokens]"
    return "" if answer.strip() else "[empty answer]"


def converse(encoding, system, limit, write):
    """
    Chat until /exit or the end of standard input. Each reply reads the full conversation again: 1 or 2 s per 1,000
    tokens on a CPU. Beyond `limit` ids, forget the oldest turns. write: a function, ids -> yields the pieces of a
    reply, each in a list, and [None] when the model ends it.
    """
    with contextlib.suppress(ImportError):  # gives input() a history, and keeps pasted lines together
        importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print(HELP)
    turns = []
    initial_system = system
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
        if command == "/reset":
            turns = []
            print("(a new conversation)")
        elif command == "/system":
            system = rest.strip() or initial_system
            print(f"(the system message is now: {system})")
        elif command[:1] == "/" and command[1:].isalpha():
            print(f"({command} is not a command: {HELP})")
        elif line:
            kept = [*turns, {"role": "user", "content": line}]
            while len(ids := question_ids(encoding, system, kept)) > limit and len(kept) > 1:
                kept = kept[2:]  # without the oldest question and its answer
            if len(ids) > limit:
                print(f"(too long: {len(ids)} tokens with the system message, but at most {limit} fit)")
                continue
            if forgotten := (len(turns) + 1 - len(kept)) // 2:
                print(f"(the context is full: {forgotten} of {len(turns) // 2} earlier turns are forgotten)")
            pieces = []
            try:
                for (piece,) in write(ids):
                    pieces.append(piece or "")
                    print(pieces[-1], end="", flush=True)
                print(describe_end("".join(pieces), piece, len(pieces)))
            except KeyboardInterrupt:
                print(" (stopped)")
            turns = [*kept, {"role": "assistant", "content": "".join(pieces)}]


@one_line_errors("use --dtype=bfloat16, a shorter prompt or fewer samples")
def main(config):
    prompt = read_prompt("The" if config.prompt is None else config.prompt)
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, device)
    torch.set_float32_matmul_precision(precision)

    # The weights, and the chat template that they were trained with
    source = find_weights(config.init_from, config.out_dir, config.base, config.tokenizer)
    print(source.about)
    pattern = re.escape(TEMPLATE).replace(re.escape(SYSTEM), r"([^'\\]+)")  # some copies have a different sentence
    template = re.fullmatch(pattern, str(source.chat_template).replace("\\n", "\n").strip())
    if config.chat and not template:
        problem = "have a different chat template" if source.chat_template else "were not trained to chat"
        print(f"note: these weights {problem}: SmolLM2's template is used, and answers may make little sense")
    system = config.system or (template[1] if template else SYSTEM)

    # The model. Decoding spends its time reading the weights, so they are converted to bf16, not only the matmuls.
    model = load_model(source).to(device)
    for p in model.parameters():
        p.data = p.data.to(getattr(torch, dtype))
    if config.compile:
        try_compiling(model, lambda: list(model.generate(torch.tensor([[END_OF_TEXT]], device=device), 3)), print)
    encoding = load_tokenizer(**source.tokenizer)
    stop_ids = (END_OF_TEXT, encoding.encode_single_token("<|im_end|>"))
    settings = dict(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        repetition_penalty=config.repetition_penalty, stop_ids=stop_ids,
        allowed=torch.tensor(list_known_ids(encoding, model.config.vocab_size), device=device),
        generator=torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip

    def write(ids, rows=1):
        """Continue the ids `rows` times. For each token yield the new text of each row; None after a row has ended."""
        new_decoder = codecs.getincrementaldecoder("utf-8")  # a character may span several tokens
        decoders = [new_decoder(errors="replace") for _ in range(rows)]
        for new in model.generate(torch.tensor([ids] * rows, device=device), **settings):
            tokens = [None if i in stop_ids else encoding.decode_single_token_bytes(i) for i in new.tolist()]
            yield [token and decoder.decode(token) for decoder, token in zip(decoders, tokens, strict=True)]

    # A conversation, or the prompt
    context = model.config.max_position_embeddings
    if config.chat and config.prompt is None:
        return converse(encoding, system, context - min(config.max_new_tokens, context // 2), write)
    if config.chat:
        ids = question_ids(encoding, system, [{"role": "user", "content": prompt}])
    else:
        ids = encode(encoding, prompt) or [END_OF_TEXT]
    check(len(ids) <= context, f"the prompt has {len(ids)} tokens, but the context only {context}: shorten the prompt")

    # Print the first sample while it is written, and the others at the end.
    prefix = f"---\n{prompt}" + ("\n" if config.chat else "")
    samples = [""] * config.num_samples
    num_tokens = 0
    start = time.perf_counter()
    print(prefix, end="", flush=True)
    for pieces in write(ids, config.num_samples):
        num_tokens += len(pieces)
        samples = [text + (piece or "") for text, piece in zip(samples, pieces, strict=True)]
        print(pieces[0] or "", end="", flush=True)
    seconds = time.perf_counter() - start
    for i, (text, last_piece) in enumerate(zip(samples, pieces, strict=True)):
        note = describe_end(text, last_piece, config.max_new_tokens) if config.chat else ""
        print(note if i == 0 else prefix + text + note)
    print(f"--- {num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.0f} tok/s, {dtype} on {device}")


if __name__ == "__main__":
    main(configure(SampleConfig))
