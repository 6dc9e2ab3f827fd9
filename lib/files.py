"""
Write files atomically, lock folders, read JSON objects, compute checksums.

    with write_atomically("out/loss.png") as file: file.write(content)
    with lock_folder("out", "out_dir"): ...         # with a single writer
    meta = read_json("data/python/meta.json", "prepare it again")
    digest = sha256_of("data/python/train.bin")

An atomic write goes to a temporary file in the same folder, is flushed to disk, and is then renamed over the old file.
At every moment, even in a power cut, the name holds either the old content or the new one.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import usable


@contextlib.contextmanager
def write_atomically(path, mode="wb", **options):
    """Open a file for writing that becomes `path` when the block ends. If the block fails, `path` stays untouched."""
    path = os.path.realpath(path)  # replace the target of a symbolic link, not the link
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(unfinished, mode, **options) as file:
            if os.path.exists(path):
                os.chmod(unfinished, os.stat(path).st_mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()  # exists only if something failed


def put_in_place(unfinished, path):
    """Rename a finished file (or folder) to `path`, and flush the rename itself to disk."""
    os.replace(unfinished, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def lock_folder(folder, setting):
    """
    Make this process the only writer of `folder` in the block. Exit and name the setting if there is one already.
    Remove temporary files of dead writers, and afterwards an empty folder. A killed process releases the lock as well.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    other = f"choose a different --{setting}"
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except UnicodeEncodeError:
        sys.exit(f"error: --{setting} is not UTF-8, and ckpt.pt could not name it: {other}")
    except Timeout:
        sys.exit(f"error: {folder} is in use by another process: wait for it, stop it, or {other}")
    except OSError as error:
        sys.exit(f"error: {folder} cannot be written to ({error.strerror}): {other}")
    for leftover in folder.iterdir():
        if re.fullmatch(r".+\.\d+\.tmp", leftover.name) and leftover.is_file():
            leftover.unlink()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()  # while we hold it; filelock never locks a removed file
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails unless it is empty


def read_json(path, hint):
    """Return the dict in a JSON file. Exit with `hint` if it cannot be read."""
    with usable(path, hint):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is JSON, but not an object")
        return content


def sha256_of(path):
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
