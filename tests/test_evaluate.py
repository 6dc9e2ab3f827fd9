"""Test evaluate.py against transformers: log-likelihoods, losses of text, standard errors; and its error messages."""

import json
import math
import re
from configurator import configure

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import llama, load, save, save_checkpoint, tiny, write_dataset

import evaluate
from evaluate import EvaluateConfig, cut_windows, encode_choices, grade, score
from lib.oracle import build_oracle
from lib.tasks import TASKS, Item, read_items, read_task_file

TEXT = "The naïve cat sat on the mat.\n\n" * 16 + "It was 12 o'clock — “late”, said the cat.\n"


def run(capfd, *flags):
    """Run evaluate.py. Return (exit code or message, standard output, standard error)."""
    code = 0
    try:
        evaluate.main(configure(EvaluateConfig, ["--device=cpu", "--dtype=float32", *map(str, flags)]))
    except SystemExit as exit:
        code = exit.code
    output = capfd.readouterr()
    return code, output.out, output.err


def numbers(capfd, tmp_path, *flags):
    """Return the results in --json, by column, and the output."""
    code, output, _ = run(capfd, f"--json={tmp_path / 'new' / 'numbers.json'}", *flags)
    assert code == 0, code
    return json.loads((tmp_path / "new" / "numbers.json").read_text())["results"], output


@pytest.fixture(autouse=True)
def load_tokenizer_once(monkeypatch, encoding):
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda **_: encoding)


@pytest.fixture(scope="module")
def model():
    return tiny(initializer_range=0.2)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("out")
    save_checkpoint(folder, model)
    return folder


# ---- Multiple choice
SHORT = [("What comes first?", ["a", "b"], 0), ("", ["The capital", "Zqx vrt"], 0)]  # and an empty question
QUESTIONS = [  # (question, choices, index of the right one)
    ("Which of these is a liquid at room temperature?", ["iron", "water", "oxygen", "salt"], 1),
    ("What do bees make?", ["honey", "a great deal of silk", "milk", "paper money"], 0),
    ("The sun is a", ["planet", "moon", "comet that comes back every 76 years", "star"], 3),
    ("Wie heißt die Hauptstadt Österreichs?", ["Wien", "Zürich", "München", "Łódź"], 0),
    ("How many legs has a spider?  ", ["6", "8", "100", "0"], 1),
    ("To dry wet shoes,\n", ["put them in water.", "stuff them with newspaper.", "eat them.", "wait 3 s."], 1),
]
SENTENCES = [  # (beginning, two ways to fill the gap, end, index of the right one)
    ("The cup did not fit in the box because the ", "box", "cup", "was too large.", 1),
    ("Ann thanked Mary because ", "Ann", "Mary", "had helped.", 1),
    ("The rope broke, not the chain, for the ", "rope", "chain", "was the weaker one.", 0),
    ("Jane sold Eve her car, so ", "Jane", "Eve", "'s garage is empty.", 0),
]
ENDINGS = ["pours it into a pan.", "[step] flies away  on a broom.", "sings, [noise] and leaves.", "is a spoon."]
CLEAN_ENDINGS = ["pours it into a pan.", " flies away on a broom.", "sings, and leaves.", "is a spoon."]
SCENES = [  # (raw ctx_a, raw ctx_b, the question that they make)
    ("A man breaks an egg.", "he", "Baking: A man breaks an egg. He"),
    ("A woman stirs.", "then SHE", "Baking: A woman stirs. Then she"),
    ("How to bake [title] Heat the oven. [step] Wait.", "", "Baking: How to bake. Heat the oven. Wait."),
    ("[header] Flour is sifted.", "the", "Baking: Flour is sifted. The"),
    ("Sugar  is weighed [substeps] twice.", "it", "Baking: Sugar is weighed twice. It"),
]


def mark(choices):
    return {"text": choices, "label": list("ABCD")}


def ask(question, choices, gold):
    return Item([question] * len(choices), choices, gold)


def layouts():
    """Return {layout: (raw rows, their Items)}."""
    prompted = [ask(f"Question: {q}\nAnswer:", c, g) for q, c, g in QUESTIONS]
    filled = [Item([start + a, start + b], [end] * 2, gold) for start, a, b, end, gold in SENTENCES]
    return {
        "query": (
            [dict(query=q, choices=c, gold=g) for q, c, g in QUESTIONS + SHORT], [ask(*q) for q in QUESTIONS + SHORT],
        ),
        "context_options": (
            [dict(context_options=[s + a, s + b], continuation=end, gold=g) for s, a, b, end, g in SENTENCES], filled,
        ),
        "winogrande": (
            [dict(sentence=f"{s}_ {e}", option1=a, option2=b, answer=str(g + 1)) for s, a, b, e, g in SENTENCES],
            filled,
        ),
        "hellaswag": (
            [dict(activity_label="Baking", ctx_a=a, ctx_b=b, endings=ENDINGS, label="0") for a, b, _ in SCENES],
            [ask(query, CLEAN_ENDINGS, 0) for *_, query in SCENES],
        ),
        "arc": ([dict(question=q, choices=mark(c), answerKey="ABCD"[g]) for q, c, g in QUESTIONS], prompted),
        "openbook_qa": (
            [dict(question_stem=q, choices=mark(c), answerKey="ABCD"[g] + " ") for q, c, g in QUESTIONS],
            [ask(*q) for q in QUESTIONS],
        ),
        "piqa": (
            [dict(goal=q, sol1=c[0], sol2=c[1], label=g % 2) for q, c, g in QUESTIONS],
            [ask(q.contexts[0], q.continuations[:2], q.gold % 2) for q in prompted],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("layout", layouts())
def test_items_of_each_layout(tmp_path, layout):
    rows, items = layouts()[layout]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_items(read_task_file(tmp_path / "a.jsonl")) == items


@torch.no_grad()
def test_log_likelihoods_as_transformers_and_lm_evaluation_harness(real_model, encoding, hf_tokenizer):
    """
    Each choice is scored by the harness's rule: the ids after those of the context. The harness itself takes part if
    it is installed: pip install --no-deps lm_eval==0.4.13 accelerate==1.15.0.
    """
    oracle = build_oracle(real_model.config, real_model.state_dict())
    names = ("query", "winogrande", "hellaswag")  # the others make the same strings
    items = [item for name in names for item in layouts()[name][1]]
    choices = [(q, " " + c) for item in items for q, c in zip(item.contexts, item.continuations, strict=True)]
    rows, num_cut = encode_choices(items, encoding, 2_048)
    ours = [-losses.sum() for losses in score(real_model, rows, 8, "cpu", "float32")]
    theirs = []
    for context, continuation in choices:
        ids = hf_tokenizer.encode(context + continuation).ids
        before = len(hf_tokenizer.encode(context.rstrip()).ids)
        if not context:
            ids, before = [0, *ids], 1
        log_probs = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
        theirs.append(sum(log_probs[i - 1, ids[i]].item() for i in range(before, len(ids))))
    assert num_cut == 0 and len(ours) == len(theirs) > 50
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)

    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=hf_tokenizer, bos_token=end, eos_token=end, pad_token=end)
    harness = HFLM(pretrained=oracle, tokenizer=tokenizer, device="cpu", batch_size=8)
    theirs = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in choices], disable_tqdm=True)
    np.testing.assert_allclose(ours, [value for value, _ in theirs], atol=1e-3, rtol=0)


@torch.no_grad()
def test_contexts_are_cut_from_the_left(model, encoding):
    """The last tokens before a choice are kept, and white space before it is scored with it."""
    rows, num_cut = encode_choices([ask(*q) for q in QUESTIONS], encoding, 9)
    losses, too_long = iter(score(model, rows, 8, "cpu", "float32")), 0
    for question, choices, _ in QUESTIONS:
        for choice in choices:
            ids = encoding.encode_ordinary(f"{question} {choice}")
            count = len(ids) - len(encoding.encode_ordinary(question.rstrip()))
            too_long += len(ids) > 10
            ids = torch.tensor([ids[-10:]])
            expected = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")[-count:]
            np.testing.assert_allclose(next(losses), expected, atol=1e-3)
    assert 0 < num_cut == too_long < len(rows)


def test_accuracies(capfd, tmp_path, out_dir):
    """Each measure ranks these choices differently. The means have standard errors."""
    choices = ["a long answer ...", "b", "żżż"]  # 17, 1 and 3 characters; 17, 1 and 6 bytes
    losses = [np.array([10.0, 7.0]), np.array([2.0]), np.array([4.5])]
    items = [Item(["Q"] * 3, choices, gold) for gold in (1, 0, 2)]
    assert grade(items, losses * 3).tolist() == np.eye(3).tolist()  # acc says "b", acc_norm the long one
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in layouts()["query"][0]))
    results, output = numbers(capfd, tmp_path, f"--items={path}", f"--out_dir={out_dir}", "--window=9")
    assert re.search(r"note: \d+ choices do not fit the window of 9 tokens", output)
    for mean, error in results["A"].values():
        right = np.arange(8) < round(8 * mean)
        assert [mean, error] == pytest.approx([right.mean(), right.std(ddof=1) / 8**0.5])


def test_tasks_from_the_hub(capfd, tmp_path, out_dir, monkeypatch):
    requests = []
    rows = {"allenai/ai2_arc": "arc", "Rowan/hellaswag": "hellaswag", "allenai/openbookqa": "openbook_qa",
            "baber/piqa": "piqa", "allenai/winogrande": "winogrande"}  # fmt: skip

    def load_dataset(*args, **kwargs):
        requests.append((*args, kwargs["split"]))
        return datasets.Dataset.from_list(layouts()[rows[args[0]]][0])

    code, _, _ = run(capfd, "--task=piqa", f"--out_dir={out_dir}")  # no test reaches the Hub
    assert re.fullmatch(r"error: Hub dataset baber/piqa, .* \(.*Offline.*--items=FILE, a local copy .*", code)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task in TASKS:
        assert run(capfd, f"--task={task}", f"--out_dir={out_dir}", "--limit=4")[1].count(f"{task}: 4 questions") == 1
    assert requests == list(TASKS.values())
    results, output = numbers(capfd, tmp_path, "--task=winogrande", f"--out_dir={out_dir}")
    assert "winogrande: 4 questions, 8 choices" in output
    assert results["A"]["acc"] == results["A"]["acc_norm"] == results["A"]["acc_bytes"]  # choices of the same length


# ---- Text
@torch.no_grad()
@pytest.mark.parametrize("window, stride", [(10, 3), (13, 13), (7, 1), (64, 20)])
def test_each_token_is_scored_once_as_transformers(tmp_path, window, stride):
    oracle = llama()
    stream = np.random.default_rng(0).integers(96, size=60)
    rows = cut_windows(stream, window, stride)
    losses = np.concatenate(score(load(save(tmp_path / "a", oracle)), rows, 4, "cpu", "float32"))
    first = 0
    for ids, scored in rows:  # the model sees the tokens of the window, and nothing else
        new = int(scored.sum())
        end = 1 + first + new
        start = max(0, end - 1 - window)
        assert scored[-new:].all() and (ids == stream[start:end]).all()
        assert first == 0 or len(scored) - new >= min(window - stride, first)  # tokens of context
        logits = oracle(torch.tensor(stream[None, start : end - 1])).logits[0]
        expected = F.cross_entropy(logits, torch.tensor(stream[start + 1 : end]), reduction="none")
        np.testing.assert_allclose(losses[first : first + new], expected[-new:], atol=1e-4)
        first += new
    assert first == len(losses) == 59


@torch.no_grad()
def test_a_text_file(capfd, tmp_path, out_dir, model, encoding):
    """Text shorter than the window has the plain loss, with all its tokens as context."""
    text = TEXT[:200]
    (tmp_path / "notes.txt").write_text(text, newline="")
    ids = encoding.encode_ordinary(text)
    loss = model(torch.tensor([[0, *ids[:-1]]]), torch.tensor([ids])).item()
    results, output = numbers(capfd, tmp_path, f"--text={tmp_path}/notes.txt", f"--out_dir={out_dir}", "--stride=100")
    bits = loss * len(ids) / math.log(2) / len(text.encode())
    assert [value for value, _ in results["A"].values()] == pytest.approx([loss, math.exp(loss), bits], rel=1e-5)
    assert f"{len(ids)} tokens, {len(text.encode())} bytes, in 1 blocks" in output
    assert results["A"]["nats per token"][1] is None and output.count("±") == 1


def test_a_dataset_and_a_paired_difference(capfd, tmp_path, out_dir, model, encoding):
    """Standard errors are over documents. The difference to the same weights is 0 ± 0."""
    save_checkpoint(tmp_path / "b", tiny(seed=1, initializer_range=0.2))
    texts = [TEXT[: 10 + 5 * i] for i in range(25)]
    ids = [i for text in texts for i in [*encoding.encode_ordinary(text), 0]]
    write_dataset(tmp_path / "notes", val=ids, vocab_size=49_152)
    flags = ["--dataset=notes", f"--data_dir={tmp_path}", f"--out_dir={out_dir}", "--window=64"]
    same, output = numbers(capfd, tmp_path, *flags, "--against=resume")
    assert set(map(tuple, same["A - B"].values())) == {(0.0, 0.0)} and same["A"] == same["B"]
    assert "25 documents; window 64 tokens, stride 32" in output
    size = sum(len(text.encode()) for text in texts)
    assert f"{len(ids):,} tokens, {size:,} bytes, in 25 documents" in output
    other, output = numbers(capfd, tmp_path, *flags, f"--against={tmp_path / 'b' / 'ckpt.pt'}")
    a, b, difference = (other[column]["nats per token"] for column in ("A", "B", "A - B"))
    assert other["A"] == same["A"] and difference[0] == pytest.approx(a[0] - b[0]) and "s.e.)" in output

    # The jackknife: the standard error over documents, by leaving out one at a time
    losses = np.concatenate(score(model, cut_windows(np.array([0, *ids]), 64, 32), 8, "cpu", "float32"))
    unit = np.repeat(np.arange(25), [len(encoding.encode_ordinary(text)) + 1 for text in texts])
    without = np.array([losses[unit != i].mean() for i in range(25)])
    jackknife = math.sqrt(24 / 25 * ((without - without.mean()) ** 2).sum())
    assert a == pytest.approx([losses.mean(), jackknife], rel=0.1)


@torch.no_grad()
def test_only_learned_tokens_of_conversations_are_scored(capfd, tmp_path, out_dir, model, encoding):
    ids = np.array(encoding.encode_ordinary(TEXT)[:170]).reshape(10, 17)
    ids[:, -1] = 2  # <|im_end|>, which is learned but has no bytes
    mask = np.random.default_rng(0).integers(2, size=(10, 17))
    mask[:, -1], mask[3] = 1, 0  # a row with nothing to learn
    stream, learned = ids.ravel().tolist(), mask.ravel().tolist()
    write_dataset(tmp_path / "chat", stream, stream, learned, vocab_size=49_152, block_size=16)
    flags = ["--dataset=chat", f"--data_dir={tmp_path}", f"--out_dir={out_dir}"]
    results, output = numbers(capfd, tmp_path, *flags)
    x, y = torch.tensor(ids[:, :-1]), torch.tensor(np.where(mask, ids, -1)[:, 1:])
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1).item()
    learned = y[y >= 0].tolist()
    size = sum(len(encoding.decode_single_token_bytes(i)) for i in learned if i != 2)
    assert results["A"]["nats per token"][0] == pytest.approx(loss, abs=1e-5)
    assert results["A"]["bits per byte"][0] == pytest.approx(loss * len(learned) / math.log(2) / size, rel=1e-5)
    assert f"{len(learned)} tokens, {size} bytes, in 9 rows" in output
    code, _, error = run(capfd, *flags, "--window=8")
    assert code == 2 and re.match(r"error: window has no effect on .*val\.bin, conversations in rows of 16", error)


# ---- Errors
GOOD = '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'


@pytest.mark.parametrize("content, message", [
    ("", "holds no question"),
    (GOOD + '{"text": "a"}', r"line 2 cannot be used .\['text'\] is not a known layout.*: use rows of query"),
    (GOOD.replace('"gold": 0', '"gold": 2'), "line 1 .*the right answer is 2, which is not one of 2"),
    (GOOD.replace('"b"', '""'), "a choice is empty"),
    (GOOD.replace('"b", "c"', '"b"'), "fewer than two"),
    (GOOD.replace('"b"', "null"), "a choice is not a string"),
    (GOOD.replace('["b", "c"]', '"bc"'), "line 1 .* its choices are a list"),
    (GOOD.replace('"a"', '["a", "b", "c"]'), "line 1 .* a question is a string"),
    ('{"context_options": "ab", "continuation": "c", "gold": 0}', "line 1 .* its choices are a list"),
    ('{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": "de", "label": "0"}', "line 1 .* are a list"),
    ('{"question": "a", "choices": {"text": "bc", "label": "AB"}, "answerKey": "A"}', "line 1 .* choices are a list"),
    (GOOD.replace('"b"', '"' + "word " * 200 + '"'), r"has \d+ tokens, which a window of 128 cannot score"),
])  # fmt: skip
def test_bad_items(capfd, tmp_path, out_dir, content, message):
    (tmp_path / "items.jsonl").write_text(content)
    code, _, _ = run(capfd, f"--items={tmp_path / 'items.jsonl'}", f"--out_dir={out_dir}")
    assert re.match("error: ", code) and re.search(message, code) and "\n" not in code


@pytest.mark.parametrize("flags, message", [
    (["--text=a b.jsonl"], "a b.jsonl holds rows: run python prepare_data.py --dataset='a b.jsonl' first"),
    (["--text=empty.txt"], "empty.txt holds no text"),
    (["--json=empty.txt/a.json", "--out_dir=nowhere"], "error: empty.txt: (File exists|Not a directory): move it away"),
    (["--json=small", "--out_dir=nowhere"], "small cannot be written to: choose a different file with --json="),
    (["--text=notes.txt", "--window=129"], "window 129 is longer than the context, 128: lower"),
    (["--text=notes.txt", "--window=8", "--stride=9"], "stride 9 is longer than window 8"),
    (["--items=notes.txt"], "notes.txt is not a file of rows"),
    (["--text=notes.txt", "--against=small"], "the text has the id .*, but the weights have only 96 ids"),
])  # fmt: skip
def test_errors(capfd, tmp_path, out_dir, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for name, content in (("notes.txt", TEXT), ("empty.txt", "")):
        (tmp_path / name).write_text(content)
    save(tmp_path / "small")
    code, _, _ = run(capfd, f"--out_dir={out_dir}", *flags)
    assert re.match("error: ", code) and re.search(message, code) and "\n" not in code


@pytest.mark.parametrize("flags, message", [
    (["--text=a", "--items=b"], "--text and --items are both given"),
    (["--init_from=wheel", "--base=base"], "--base=base is for LoRA adapters"),
])  # fmt: skip
def test_wrong_commands(capfd, flags, message):
    code, _, error = run(capfd, *flags)
    assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
