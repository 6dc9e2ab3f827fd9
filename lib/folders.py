"""
A folder or a glob -> the files in it that can be read, and a count of all that is left out.

    left_out = collections.Counter()
    files = text_files(walk(Path("linux"), left_out), "linux", ".c,.h", left_out)
    print(left_out_line(left_out))          # left out: 412 .s, 3 .png, 1 unreadable folder
"""

import glob
import os
from pathlib import Path

from lib.decoding import CONVERT, encoding_of
from lib.errors import reject
from lib.readers import SUFFIXES, format_of

# Folders that hold other people's text, or no text.
NOT_YOURS = {
    "node_modules", "bower_components", "site-packages", "dist-packages", "__pycache__", "venv", "virtualenv",
    "vendor", "vendored", "_vendor", "third_party",
}  # fmt: skip


def walk(folder, left_out):
    """Yield the files of a folder. What is left out, by its name or because it cannot be entered, is counted."""

    def unreadable(error):
        left_out["unreadable folder"] += 1

    for place, folders, files in os.walk(folder, onerror=unreadable):
        if "pyvenv.cfg" in files and place != str(folder):  # a virtual environment, whatever its name
            left_out[f"folder {os.path.basename(place)}"] += 1
            folders.clear()
            continue
        for name in list(folders):
            if name.startswith(".") or name in NOT_YOURS:
                left_out[f"folder {name}"] += 1
            elif os.path.islink(os.path.join(place, name)):
                left_out["linked folder"] += 1
            else:
                continue
            folders.remove(name)
        for name in files:
            if name.startswith("."):
                left_out["hidden file"] += 1
            else:
                yield Path(place, name)


def literal_part(pattern):
    """The longest folder at the start of a glob that exists by that very name: data[v2] of data[v2]/*.txt."""
    return next(parent for parent in pattern.parents if parent.exists() or parent == parent.parent)


def matches(pattern, folder, left_out):
    """Yield the files that a glob matches. `folder` is its literal part."""
    wild = pattern.relative_to(folder)
    recursive = "**" in wild.parts
    if recursive:  # glob itself passes over a folder that it cannot read
        for _ in os.walk(folder, onerror=lambda error: left_out.update(["unreadable folder"])):
            pass
    skipped = set()
    for found in glob.iglob(os.path.join(glob.escape(str(folder)), wild), recursive=recursive):
        path = Path(found)
        parts = path.relative_to(folder).parts
        at = next((i for i, part in enumerate(parts) if part in NOT_YOURS and part not in wild.parts), len(parts))
        if at < len(parts):
            skipped.add(parts[: at + 1])
        elif not path.is_dir():
            yield path
        elif not recursive:
            left_out["folder"] += 1
    left_out.update(f"folder {parts[-1]}" for parts in skipped)


def text_files(paths, dataset, suffixes, left_out):
    """
    Those of the paths that lib/readers.py can read, sorted, because the order of a folder's files is arbitrary. The
    others are counted. A file without a suffix is taken if it is text, and under --suffixes=all any other, too.
    """
    files, every = [], suffixes.split(",")[0].strip() == "all"
    for path in sorted(set(paths), key=Path.as_posix):
        kind = format_of(path, suffixes)
        if not path.is_file():
            left_out["broken link" if path.is_symlink() else "special file"] += 1
        elif kind in SUFFIXES or kind == "text":
            files.append(path)
        elif (kind == "" or every) and kind not in CONVERT and encoding_of(path)[0]:
            files.append(path)
        else:
            left_out[kind or "binary without a suffix"] += 1
    if not files:
        found = f" ({left_out_line(left_out)})" if left_out else ""
        reject(f"{dataset}: no {' '.join(SUFFIXES)} file in it{found}: name another place, or more with --suffixes=")
    return files


def left_out_line(left_out):
    """What was left out, as text: "left out: 412 .c, 3 .png, 1 unreadable folder"."""
    kinds = sorted(left_out.items(), key=lambda item: (not item[0].startswith("."), -item[1], item[0]))
    plural = (f"{count:,} {kind.replace('folder', 'folders', count > 1)}" for kind, count in kinds)
    return f"left out: {', '.join(plural)}"
