"""
A corpus prepared on many machines: each takes one share of the files, and one of them merges what all have written.

    python prepare_data.py --dataset=corpus --part=3/64       # on the third machine: data/corpus/part_00003_of_00064/
    python prepare_data.py --dataset=corpus --merge           # in the end, on one: data/corpus/meta.json

Part 3 of 64 has every 64th file, from the third on; of a Hub dataset, every 64th of its files, or of its rows if the
number of files is no multiple of 64. A part is a folder like a dataset, with part.json in place of meta.json, so
train.py does not take it for one. The merge writes meta.json alone and leaves all ids where they are.
"""

import hashlib
import re
import sys

from lib.errors import reject
from lib.files import read_json
from lib.shards import sha256_of_shards, shards_of


def share(part):
    """The setting "3/64" -> (3, 64); "" -> (1, 1)."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", part or "1/1")
    number, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        reject(f"part={part}: not one of several parts: give --part=1/64 for the first of 64, up to --part=64/64")
    return number, parts


def part_folder(number, parts):
    return f"part_{number:05d}_of_{parts:05d}"


def listing(files):
    """A hash of the files' names and sizes: every machine must have found the same ones, wherever it keeps them."""
    lines = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def find_parts(folder):
    """The folders of all parts, in order. Ends the program with one line if one is missing."""
    found = {path.name: path for path in folder.glob("part_*") if re.fullmatch(r"part_\d{5}_of_\d{5}", path.name)}
    numbers = {int(name[-5:]) for name in found}
    if len(numbers) != 1:
        has = f"parts of {' and of '.join(map(str, sorted(numbers)))}" if numbers else "no part"
        sys.exit(f"error: {folder} has {has}: prepare all parts with --part=1/64, --part=2/64, ..., then merge them")
    (parts,) = numbers
    names = [part_folder(number, parts) for number in range(1, parts + 1)]
    if missing := [number for number, name in enumerate(names, 1) if not (folder / name / "part.json").is_file()]:
        them = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        first = f"run --part={missing[0]}/{parts}, or copy its folder here"
        sys.exit(f"error: {folder} has not all {parts} parts whole, these are missing: {them}: {first}")
    return [found[name] for name in names]


def merge(folder):
    """The meta.json of all parts in `folder`, a dict; the files stay where they are. Checks that the parts fit."""
    paths = find_parts(folder)
    parts = [read_json(path / "part.json", "prepare this part again") for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if not part.keys() >= {"run", "sources", "train", "val"}:
            sys.exit(f"error: {path / 'part.json'} is not what prepare_data.py writes: prepare this part again")
        for name, value in parts[0]["run"].items():
            if name != "part" and part["run"].get(name) != value:
                what = f"{name} {part['run'].get(name)!r}, but {paths[0].name} with {value!r}"
                sys.exit(f"error: {path} was made with {what}: prepare one of them again, with the other's setting")
    meta = {key: parts[0][key] for key in ("name", "dtype", "vocab_size", "tokenizer", "tokenizer_sha256")}
    sources = {}
    for part in parts:
        for key, value in part["sources"].items():
            if key != "encodings":  # each part.json has its own
                sources[key] = sources.get(key, 0) + value if isinstance(value, int) else sources.get(key, value)
    digests = "".join(part["sources"]["sha256"] for part in parts)
    meta["sources"] = sources | {"parts": len(parts), "sha256": hashlib.sha256(digests.encode()).hexdigest()}
    for split, other in (("train", "lower"), ("val", "raise")):
        counts = {key: sum(part[split][key] for part in parts) for key in ("tokens", "bytes", "documents")}
        shards = []
        for path, part in zip(paths, parts, strict=True):
            for shard in shards_of(part[split], split):
                if shard["tokens"]:
                    shards.append(shard | {"file": f"{path.name}/{shard['file']}"})
        if not shards:
            sys.exit(f"error: {folder}: {split} is empty in all parts: prepare them again, and {other} --val_fraction")
        meta[split] = counts | {"sha256": sha256_of_shards(shards), "shards": shards}
    return meta
