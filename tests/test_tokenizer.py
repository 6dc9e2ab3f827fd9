"""lib/tokenizer.py: any text gets the same ids as from `tokenizers`, the library that made the release's tokenizer."""

import contextlib
import importlib
import json
from configurator import configure

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import llama, refusal, save, save_checkpoint, tiny, write_dataset
from transformers import AutoTokenizer

import sample
from lib import tokenizer
from lib.files import sha256_of
from lib.tokenizer import END_OF_TEXT, NO_TOKEN, TOKENIZER_SHA256, VOCAB_SIZE, encode, load_tokenizer, tokenizer_json

# Corner cases of the pattern. Tests join them in any order, with any characters between them.
PIECES = [
    *"019", "2024", "٣", "५", "১", "〇", "Ⅷ", "½", "²", "௰", "𝟘", "𐄇",  # digits: Nd, Nl, No
    *" \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff\u180e", "  ", "\r\n", " \n ",
    "'s", "'t", "'re", "'ve", "'ll", "'d", "'m", "'S", "'RE", "''s", "’s", "'", "don't", "I'm", "'1", "'é",
    "the", " The", "a", "é", "e\u0301", "ß", "Ж", "漢字", "한", "ا", "ש", "ไทย", "ǅ", "ʰ", "ª", "ſ", "K",
    "😀", "👩‍👩‍👧", "🇫🇷", "👍🏽", "☺️", "\ufe0f", "\u200d", "\U000e0067", "\u0489",
    *"\x00\x01\x04\x06\x07\x08\x0e\x13\x14\x16\x1b\x1d\x7f\x80\x9f\xad", "\ufffd", "\uffff", "\U0010ffff", "\ue000",
    *"!#$%_-=+.,;:/\\()[]{}<>|~`\"", "...", "->", "§", "€", "—", "«", "\u0300",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<filename>", "<|endoftext", "def f(x):\n    return",
]  # fmt: skip

DROPPED = dict.fromkeys(NO_TOKEN[:6])  # the control characters without a token


@pytest.fixture(scope="session")
def hf_ids(hf_tokenizer):
    """Return a function: texts -> ids from `tokenizers`, with the names of special tokens as ordinary text."""
    copy = type(hf_tokenizer).from_str(hf_tokenizer.to_str())  # other tests use the original
    copy.encode_special_tokens = True
    return lambda texts: [e.ids for e in copy.encode_batch_fast(texts, add_special_tokens=False)]


characters = st.characters(exclude_categories=["Cs"])  # without halves of surrogate pairs
documents = st.lists(st.sampled_from(PIECES) | st.text(characters, max_size=4), max_size=30).map("".join)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(texts=st.lists(documents | st.text(characters), min_size=30, max_size=60))
def test_any_text(texts, encoding, hf_ids):
    texts = [text.translate(DROPPED) for text in texts]
    for text, ids in zip(texts, hf_ids(texts), strict=True):
        if not set(NO_TOKEN) & set(text.encode()):
            assert encode(encoding, text) == ids


def test_every_character(encoding, hf_ids):
    """Test all of Unicode. Each character is between a space and a letter, so its class shows in the ids."""
    assigned, empty = [range(0, 0x40000), range(0xE0000, 0xF0000)], [range(0x40000, 0x110000, 97)]
    everything = [chr(c) for planes in assigned + empty for c in planes if not 0xD800 <= c < 0xE000]
    for start in range(0, len(everything), 0x4000):
        characters = everything[start : start + 0x4000]
        texts = ["".join(f" {c}a\n{c}1" for c in characters[i : i + 64]) for i in range(0, len(characters), 64)]
        for text, ids in zip(texts, hf_ids(texts), strict=True):
            assert encode(encoding, text) == ids, f"from U+{ord(text[1]):04X}"


def test_decoding_gives_the_text_back(encoding, hf_tokenizer, real_ids):
    text = "The capital of France is Paris.\n\tdef f(x):  # 1,024 ½ naïve 漢字 😀\r\n\u3000'll"
    assert encoding.decode(encode(encoding, text)) == text
    ids = real_ids.tolist()
    assert encoding.decode(ids) == hf_tokenizer.decode(ids) and encode(encoding, encoding.decode(ids)) == ids
    assert encode(encoding, "The capital of France") == [504, 3575, 282, 4649]
    assert encode(encoding, "a  1") == [81, 256, 33]


def test_every_id_decodes_to_its_own_bytes(encoding, hf_tokenizer):
    vocab, byte_of = hf_tokenizer.get_vocab(), tokenizer.build_byte_table()
    special = {token.content for token in hf_tokenizer.get_added_tokens_decoder().values()}
    assert sorted(vocab.values()) == list(range(VOCAB_SIZE)) and len(special) == 17
    assert len(byte_of) == 256 == len(set(byte_of.values()))
    for token, id in vocab.items():
        expected = token.encode() if token in special else bytes(byte_of[c] for c in token)
        assert encoding.decode_single_token_bytes(id) == expected


def test_bytes_without_a_token_are_dropped(encoding, hf_tokenizer, hf_ids):
    vocab = hf_tokenizer.get_vocab()
    without = [byte for character, byte in tokenizer.build_byte_table().items() if character not in vocab]
    assert sorted(without) == list(NO_TOKEN) and len(NO_TOKEN) == 21
    assert encoding.n_vocab == VOCAB_SIZE + 21  # so the vocabulary size is VOCAB_SIZE, not n_vocab
    assert encode(encoding, "") == encode(encoding, "\x04") == []
    for text in ("a\x04b\x1d\x06", "\U00040000\U00080000", "a \x04a", "\n\n\x04", "1\x1d\x1d 1"):
        assert encode(encoding, text) == hf_ids([text])[0], text
    assert (encode(encoding, "*\x06:"), hf_ids(["*\x06:"])) == ([26, 42], [[13714]])  # it drops before it merges


def test_names_of_special_tokens_and_halves_of_surrogate_pairs_are_text(encoding, hf_ids, hf_tokenizer):
    text = "one<|endoftext|>two<|im_start|>user\n<filename>a.py<|im_end|>"
    ids = encode(encoding, text)
    assert END_OF_TEXT not in ids and min(ids) > 16 and encoding.decode(ids) == text
    as_special = hf_tokenizer.encode(text).ids
    assert encoding.encode(text, allowed_special="all") == as_special and {0, 1, 2} < set(as_special)
    assert [encode(encoding, "caf\udce9 1")] == hf_ids(["caf? 1"])  # Python's reading of an argument that is not UTF-8


@pytest.mark.parametrize("run", [" ", "\n", "\t", "\u3000", " \n"])
def test_long_runs_of_white_space(run, encoding, hf_ids):
    texts = [run * n + tail for n in (1, 2, 3, 100, 4_097, 100_000) for tail in ("", "x", "1")]
    texts += [run * (1_100_000 // len(run)) + "x"]  # too long for tiktoken itself
    for text, ids in zip(texts, hf_ids(texts), strict=True):
        assert encode(encoding, text) == ids, len(text)


def change(*path):
    """Return a function that sets a value in tokenizer.json: its path, then the value, or a function of the old one."""
    *path, key, value = path

    def apply(content):
        for name in path:
            content = content[name]
        content[key] = value(content[key]) if callable(value) else value

    return apply


PAD = {"id": VOCAB_SIZE, "content": "<pad>", "special": True}
OTHER = "its tokens, merges or rules differ"
ADDED = "its added tokens differ"


@pytest.mark.parametrize("damage, words", [
    (change("model", "merges", lambda m: [m[1], m[0], *m[2:]]), OTHER),
    (change("model", "vocab", lambda v: v | {"the": v["a"], "a": v["the"]}), OTHER),
    (change("model", "vocab", "<|im_start|>", True), OTHER),
    (change("normalizer", {"type": "NFC"}), OTHER),
    (change("pre_tokenizer", "pretokenizers", 0, "individual_digits", False), OTHER),
    (change("model", {"type": "Unigram", "vocab": [["a", 0.0]]}), "cannot be used"),
    (change("added_tokens", lambda a: a[:-1]), ADDED),
    (change("added_tokens", 3, "id", 5), ADDED),
    (change("added_tokens", lambda a: [*a, PAD | {"id": 500}]), ADDED),
    (change("added_tokens", lambda a: [*a, PAD, PAD | {"content": "b"}]), ADDED),
    (change("added_tokens", lambda a: [*a, PAD | {"id": 2**40}]), "cannot be used"),
    (change("added_tokens", None), "cannot be used"),
    ("", "tokenizer.json cannot be used"), ("[1, 2]", "tokenizer.json cannot be used"),
    ('{"model": ', "tokenizer.json cannot be used"), ("[" * 100_000, "tokenizer.json cannot be used"),
])  # fmt: skip
def test_a_different_tokenizer_gets_one_line(damage, words, tmp_path):
    content = json.loads(tokenizer_json()[0])
    text = damage if isinstance(damage, str) else damage(content) or json.dumps(content)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert words in refusal(load_tokenizer, tmp_path)


def test_a_tokenizer_may_be_saved_by_a_different_tool_and_add_tokens(encoding, hf_tokenizer, tmp_path):
    """As transformers does for <pad>. The bytes without a token get higher ids."""
    content = json.loads(hf_tokenizer.to_str())
    assert content["model"]["merges"] != json.loads(tokenizer_json()[0])["model"]["merges"]  # pairs, not strings
    content["added_tokens"].append(PAD)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    other = load_tokenizer(tmp_path)
    assert other._special_tokens == encoding._special_tokens | {"<pad>": VOCAB_SIZE}
    assert encode(other, "a <pad>\x04 1") == encode(encoding, "a <pad>\x04 1")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "spiece.model"])
def test_a_folder_with_a_different_kind_of_tokenizer_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    message = refusal(load_tokenizer, tmp_path)
    assert f"{name} has no tokenizer.json next to it" in message and "--tokenizer=base" in message


@pytest.fixture(scope="module")
def saved_again(tmp_path_factory):
    """Return a folder with a model and SmolLM2's tokenizer, saved again by transformers 5."""
    folder = save(tmp_path_factory.mktemp("saved_again"), llama(vocab_size=VOCAB_SIZE))
    (folder / "tokenizer.json").write_bytes(tokenizer_json()[0])
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')  # as the release's says
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


SMALL = ["--device=cpu", "--dtype=float32"]
TEXT = [*SMALL, "--text=notes.txt", "--window=8"]
ONE_ITERATION = [*SMALL, "--dataset=text", "--max_iters=1", "--block_size=8", "--batch_size=1", "--eval_iters=1"]


@pytest.mark.parametrize("script, flags, names", [
    ("sample", [*SMALL, "--max_new_tokens=2"], "--init_from"), ("evaluate", TEXT, "--init_from"),
    ("evaluate", [*TEXT, "--init_from=ours"], "--against"), ("export", ["--to=copy"], "--init_from"),
    ("train", [*ONE_ITERATION, "--sample_interval=0"], "--init_from"),
])  # fmt: skip
def test_every_script_refuses_it(script, flags, names, saved_again, encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("It was 12 o'clock.")
    save_checkpoint(tmp_path / "ours", tiny())
    write_dataset(tmp_path / "data/text", vocab_size=VOCAB_SIZE)
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "load_tokenizer", lambda path=None: load_tokenizer(path) if path else encoding)
    if script == "train":
        monkeypatch.setattr("lib.processes.handle", lambda handler: None)
        monkeypatch.setattr(module, "note_signals", list)

    def run(*more):
        cls, saved = getattr(module, f"{script.title()}Config"), getattr(module, "saved_settings", None)
        module.main(configure(cls, [f"{names}={saved_again}", *flags, *more], saved))

    message = refusal(run)
    assert "it no longer splits digits, as transformers 5 saves it" in message and "--tokenizer=base" in message
    assert not (tmp_path / "copy").exists() and not (tmp_path / "out/ckpt.pt").exists()
    with contextlib.nullcontext() if script != "train" else pytest.raises(SystemExit, match="^0$"):
        run("--tokenizer=base")
    assert script != "export" or sha256_of("copy/tokenizer.json") == TOKENIZER_SHA256


def test_a_vocabulary_smaller_than_smollm2s_is_refused(encoding, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_tokenizer", lambda path: encoding)
    folder = save(tmp_path / "small")
    message = refusal(sample.main, configure(sample.SampleConfig, [*SMALL, f"--init_from={folder}"]))
    assert "the model has 96 token ids, SmolLM2's tokenizer 49,152: use" in message
    assert "note: there is no tokenizer.json next to these weights" in capsys.readouterr().out
