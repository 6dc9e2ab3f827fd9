"""
A corpus of any size, written as several files of token ids; lib/dataset.py reads them as one array.

prepare_data.py writes into data/<name>/unfinished/, and moves the files to data/<name>/ when all are complete. After
each whole shard it notes in unfinished/state.json how far it is, so an interrupted run goes on from there.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from lib.errors import first_line
from lib.files import flush_folder, json_object, sha256_of, written_whole

# ---------------------------------------------------------------------------------------------
# meta.json's list of files


def shards_of(counts, split):
    """The files of a split as [{"file", "tokens", "sha256"}]. counts: what meta.json says of the split."""
    whole = {"file": f"{split}.bin", "tokens": counts["tokens"], "sha256": counts["sha256"]}
    return counts.get("shards", [whole])


def shard_name(number):
    return f"train_{number:05d}.bin"


def sha256_of_shards(shards):
    """The sha256 of a split: that of its shards' sha256s, in order and in hexadecimal."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def unfinished(folder, run):
    """
    (draft, state): the folder to write to, and how far the interrupted run is that left its shards there. If there is
    none, or its `run` was another, the state is that of the start. run: dict of plain values that decide which ids are
    written, and where a shard ends. If the block fails, the draft stays only if there is a whole shard in it.

    The state: run, shards (whole ones, as in meta.json), bundles (all written before the one in which the last of these
    shards ended), counts (of those bundles), digest (of the documents up to the end of that one).
    """
    draft = folder / "unfinished"
    run = json.loads(json.dumps(run))
    state = {"run": run, "shards": [], "bundles": 0, "counts": None, "digest": None}
    try:
        found = json_object((draft / "state.json").read_bytes())
        changed = [name for name in run if found["run"].get(name) != run[name]]
        whole = all((draft / s["file"]).stat().st_size == 2 * s["tokens"] for s in found["shards"])
        whole = whole and (draft / "val.bin").stat().st_size >= 2 * found["counts"]["val"]["tokens"]
        why = f"it was made with another {', '.join(changed)}" if changed else "" if whole else "it is not whole"
    except FileNotFoundError:
        why = None if not (draft / "state.json").exists() else "it is not whole"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"its state.json cannot be read ({first_line(error)})"
    if why == "":
        state = found
        shards, tokens = len(state["shards"]), sum(shard["tokens"] for shard in state["shards"])
        tqdm.write(f"going on after {shards:,} whole shards, {tokens:,} tokens: their text is read, not encoded again")
    else:
        if why:
            tqdm.write(f"note: {draft}, what an interrupted run left, is not used, {why}: starting over")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    try:
        yield draft, state
    finally:
        if not (draft / "state.json").exists():
            shutil.rmtree(draft, ignore_errors=True)


def after(bundles, state, draft):
    """The bundles that are yet to be encoded. bundles: (digest of the documents so far, bundle) each."""
    for _ in itertools.islice(bundles, state["bundles"]):
        pass
    if not state["shards"]:
        return bundles
    first = next(bundles, (None, None))
    if first[0] != state["digest"]:
        shutil.rmtree(draft)
        sys.exit("error: the text is not what the interrupted run read: run the same command again, it starts over")
    return itertools.chain([first], bundles)


def write_bins(draft, encoded, shard_tokens, state, total):
    """
    Write train_00000.bin and so on, of shard_tokens ids each, and val.bin.

    draft, state  as `unfinished` gives them
    encoded       of each bundle `after` the state, in order: (digest, {split: (bytes for the .bin, number of
                  documents, bytes of text)})
    total         bytes of text in all, for the progress bar, or None if unknown
    Returns {split: its counts and sha256}, as in meta.json.
    """
    shards = state["shards"]
    counts = state["counts"] or {split: dict(tokens=0, bytes=0, documents=0) for split in ("train", "val")}
    done, limit = tokens_in(counts), 2 * shard_tokens  # tokens; bytes
    shown = dict(total=total, initial=sum(c["bytes"] for c in counts.values()), unit="B", unit_scale=True, disable=None)
    with contextlib.ExitStack() as stack:
        val = stack.enter_context(open(draft / "val.bin", "ab"))
        val.truncate(2 * counts["val"]["tokens"])
        train = stack.enter_context(open(draft / shard_name(len(shards)), "wb"))
        bar = stack.enter_context(tqdm(**shown))  # on a terminal only
        for number, (digest, result) in enumerate(encoded, state["bundles"]):
            before = state | {"bundles": number, "counts": copy.deepcopy(counts), "digest": digest}
            for split, (content, documents, size) in result.items():
                if split == "val":
                    val.write(content)
                else:
                    rest = content[max(0, limit * len(shards) - 2 * counts["train"]["tokens"]) :]
                    while rest:
                        if train.tell() == limit:
                            shards.append(closed(train))
                            flushed(val)
                            with written_whole(draft / "state.json", "w") as file:
                                json.dump(before | {"shards": shards}, file)
                            train = stack.enter_context(open(draft / shard_name(len(shards)), "wb"))
                        room = limit - train.tell()
                        train.write(rest[:room])
                        rest = rest[room:]
                counts[split]["tokens"] += len(content) // 2
                counts[split]["bytes"] += size
                counts[split]["documents"] += documents
                bar.update(size)
            seconds = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{(tokens_in(counts) - done) / seconds:,.0f} tokens/s", refresh=False)
        shards.append(closed(train))
        flushed(val)
    counts["val"]["sha256"] = sha256_of(draft / "val.bin")
    if len(shards) == 1:
        (draft / shards[0]["file"]).rename(draft / "train.bin")
        return counts | {"train": counts["train"] | {"sha256": shards[0]["sha256"]}}
    return counts | {"train": counts["train"] | {"sha256": sha256_of_shards(shards), "shards": shards}}


def tokens_in(counts):
    """In train and val together."""
    return sum(c["tokens"] for c in counts.values())


def closed(file):
    """Close a finished shard, safe on the disk. Returns what meta.json says of it."""
    flushed(file)
    file.close()
    path = Path(file.name)
    return {"file": path.name, "tokens": path.stat().st_size // 2, "sha256": sha256_of(path)}


def flushed(file):
    """Write all of an open file to the disk. A full one fails here."""
    file.flush()
    os.fsync(file.fileno())


def put_dataset_in_place(folder, name, meta, draft=None):
    """
    Replace the dataset in `folder` by the files in the folder `draft`, if there is one, and by `meta` as the file
    `name`. All files are complete on the disk before the first is renamed. So an error or a kill leaves the earlier
    dataset untouched, unless it comes during the renames. Even then meta.json never lies: the old one is removed before
    the renames, and the new one is renamed last.
    """
    with written_whole(folder / name, "w") as file:
        file.write(json.dumps(meta, indent=2) + "\n")
        flushed(file)
        old = [folder / f"{split}{kind}.bin" for split in ("train", "val") for kind in ("", "_mask")]
        for path in (folder / name, *old, *folder.glob("train_[0-9]*.bin")):
            path.unlink(missing_ok=True)
        for path in sorted(draft.glob("*.bin")) if draft else ():
            os.replace(path, folder / path.name)
        flush_folder(folder)
    if draft:
        shutil.rmtree(draft)
