"""
The official tokenizer.json as a tiktoken.Encoding, id for id.

    encoding = load_tokenizer()                       # 49,152 entries, built in 0.1 s
    ids = encode(encoding, "The capital of France")   # [504, 3575, 282, 4649]; encode_array is the faster
    text = encoding.decode(ids)

The release is a byte-level BPE. tiktoken needs each token's bytes and rank, and a pattern that cuts
text into pieces; the rank is the id, so the merges need not be read.
"""

import json
import re
import sys

import numpy as np
import regex
import tiktoken

from official import tokenizer_json

VOCAB_SIZE = 49_152
END_OF_TEXT = 0  # <|endoftext|>: between documents, and the base model's bos and eos

PRE_TOKENIZER = {  # as tokenizer.json has it
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
# That, as one pattern for tiktoken. Every digit (of any script: Nd, Nl and No) is split off before GPT-2's
# pattern looks, so a digit never takes the space before it, and white space before a digit stays whole:
# "a  1" is "a", "  ", "1". GPT-2's own pattern, with (?!\S) in the place of (?![^\s\p{N}]), gets 16 % of
# ordinary documents wrong.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s"

# Twenty-one bytes have no token. Hugging Face drops them from a piece of text before it merges the piece's
# bytes, so the neighbours on either side may merge. The characters that hold one: six controls, which hardly
# any text contains, and those of Unicode's planes 4 to 11, which are still empty.
NO_TOKEN = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")

# tiktoken's regex engine gives up (and panics) on a million white-space characters in a row. A power of
# two, so that runs of one character, whose tokens are powers of two long, keep their ids.
SPACE_RUN = re.compile(r"\s{524288}")


def byte_alphabet():
    """GPT-2's table: each printable stand-in character of a tokenizer.json -> the byte it stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def load_tokenizer(official="base"):
    """
    tiktoken.Encoding of the release. Encode with `encode` below; decode with encoding.decode.

    tiktoken panics at a byte without a token, so NO_TOKEN is padded here as ids from 49,152 on, which `encode`
    never gives: take the vocabulary's size from VOCAB_SIZE or the config, not from encoding.n_vocab.
    Any tokenizer but the family's ends the program with one line: PATTERN would be wrong for it.
    """
    content, place = tokenizer_json(official)
    try:
        content = json.loads(content)
        vocab = content["model"]["vocab"]
        known = len(vocab) == VOCAB_SIZE and content["pre_tokenizer"] == PRE_TOKENIZER and not content["normalizer"]
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        sys.exit(f"error: the tokenizer of {official} ({place}) is not SmolLM2's, and only that one is known here")
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): id for token, id in vocab.items() if token not in special}
    ranks |= {bytes([byte]): VOCAB_SIZE + i for i, byte in enumerate(NO_TOKEN)}
    return tiktoken.Encoding("SmolLM2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode_array(encoding, text):
    """
    Ids of a text of any length, an array of uint32. The names of special tokens are text like any other, so
    a document that contains "<|endoftext|>" cannot end itself.
    """
    content = text.encode(errors="replace")  # half of a surrogate pair is no character: "?"
    text = content.decode()
    parts, start = [], 0
    while run := SPACE_RUN.search(text, start):
        parts.append(text[start : run.end()])
        start = run.end()
    parts.append(text[start:])
    if len(content.translate(None, NO_TOKEN)) == len(content):
        return np.concatenate([encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])
    pieces = (piece.encode().translate(None, NO_TOKEN) for part in parts for piece in regex.findall(PATTERN, part))
    ids = [id for piece in pieces if piece for id in encoding._encode_single_piece(piece)]
    return np.array(ids, dtype=np.uint32)


def encode(encoding, text):
    """encode_array, as a list of int."""
    return encode_array(encoding, text).tolist()
