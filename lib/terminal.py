"""
What a person types: the prompt of sample.py, or a conversation with it.

    prompt = read_prompt("@question.txt")
    converse(encoding, system="", room=7_992, write=write)

Each reply reads the whole conversation again, from its beginning: a second or two for a thousand tokens on a CPU.
"""

import contextlib
import importlib
import sys
from pathlib import Path

from lib.chat import chat_ids

HELP = "/reset begins again, /system TEXT gives another system message, /exit or Ctrl-D ends, Ctrl-C ends a reply"


def read_prompt(prompt):
    """
    The text that --prompt= names: - is standard input and @FILE a file, in UTF-8, without the newline at their ends.
    Ends the program with one line if the file cannot be read.
    """
    if prompt != "-" and not prompt.startswith("@"):
        return prompt
    try:
        content = sys.stdin.buffer.read() if prompt == "-" else Path(prompt[1:]).expanduser().read_bytes()
        return content.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        sys.exit(f"error: {prompt[1:]}: {error.strerror}: give --prompt=@FILE with a text file")
    except UnicodeDecodeError:
        sys.exit(f"error: {prompt.lstrip('@')}: it is not UTF-8: convert it (iconv -f CP1252 -t UTF-8)")


def converse(encoding, system, room, write):
    """
    Talk until /exit or the end of standard input.

    system  the system's message; "" for the template's own
    room    ids that a conversation may have before a reply: when it has more, its oldest turns are forgotten
    write   function: ids -> yields the parts of the reply, lists of one str
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # input() then has a history and the arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print(HELP)
    turns = []
    while True:
        try:
            said = input("\n> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends the conversation)")
            continue
        command, _, rest = said.partition(" ")
        if command == "/exit":
            return
        elif command == "/reset":
            turns = []
            print("(a new conversation)")
        elif command == "/system":
            system = rest.strip()
            print(f"(the system's message is now: {system or 'the usual one'})")
        elif command[:1] == "/" and command[1:].isalpha():
            print(f"({command} is no command: {HELP})")
        elif said:
            question = {"role": "user", "content": said}
            if kept := newest_that_fit(encoding, system, [*turns, question], room):
                turns = [*kept, {"role": "assistant", "content": reply(encoding, system, kept, write)}]


def with_system(system, turns):
    return [{"role": "system", "content": system}, *turns] if system else turns


def newest_that_fit(encoding, system, turns, room):
    """The newest turns that have room; the others are told. None if the last, a question, has no room even alone."""
    kept = turns
    while (n := len(chat_ids(encoding, with_system(system, kept), generation_prompt=True)[0])) > room:
        if len(kept) == 1:
            return print(f"(too long: {n} tokens with the system's message, and there is room for {room})")
        kept = kept[2:]  # without the oldest question and its answer
    if forgotten := (len(turns) - len(kept)) // 2:
        print(f"(the context is full: {forgotten} of {len(turns) // 2} earlier turns are forgotten, the oldest first)")
    return kept


def reply(encoding, system, turns, write):
    """Print the assistant's reply as it is made, and return it. Ctrl-C ends it."""
    ids, _ = chat_ids(encoding, with_system(system, turns), generation_prompt=True)
    text = ""
    try:
        for (part,) in write(ids):
            text += part
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    return text
