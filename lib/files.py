"""
Files written whole or not at all, folders with one writer, JSON objects, checksums.

    with written_whole("out/loss.png") as file: file.write(content)
    with owned_folder("out", "out_dir"): ...        # no other run writes there meanwhile
    meta = read_json("data/python/meta.json", "prepare it again")
    digest = sha256_of("data/python/train.bin")

A write goes to a temporary file in the same folder, is flushed to the disk, and is then renamed over the old
file. So at every moment, power cuts included, the name holds either the old content or the new one.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from lib.errors import first_line


def temporary(path):
    """The name under which this process, and no other, writes what will become `path`."""
    return Path(f"{path}.{os.getpid()}.tmp")


@contextlib.contextmanager
def written_whole(path, mode="wb", **how):
    """
    A file open for writing that becomes `path` when the block ends. If the block or the disk fails, the old
    `path` stays untouched, nothing is left behind, and the error goes on to the caller. how: as for open().
    """
    unfinished = temporary(path)
    try:
        with open(unfinished, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()  # only there if something failed


def put_in_place(unfinished, path):
    """Rename a finished file (or folder) to `path`, and flush the rename itself to the disk."""
    os.replace(unfinished, path)
    flush_folder(Path(path).parent)


def flush_folder(path):
    """Flush the renames in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def owned_folder(folder, setting):
    """
    Make this process the only writer of `folder` inside the block. Creates the folder, clears away temporary files
    of dead writers, and afterwards removes the folder if nothing is in it. The system releases the lock when the
    process ends, however it ends. If another process owns the folder, the program ends with one line that tells
    its id and names `setting` as a way out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        lock = open(path, "a+")
        try:
            take_lock(lock)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                sys.exit(f"error: {folder} is in use by {owner}: wait for it, stop it, or give another --{setting}")
            print(f"note: {folder} is on a file system without locks: let no two runs write there", file=sys.stderr)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            break  # else its owner removed it between our open and our lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    for leftover in folder.iterdir():
        if re.fullmatch(r".+\.\d+\.tmp", leftover.name) and leftover.is_file():
            leftover.unlink()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.close()
        with contextlib.suppress(OSError):
            folder.rmdir()


def take_lock(file):
    """Lock an open file for this process alone, or raise OSError at once: EAGAIN or EACCES if another has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(1_000)  # beyond the text, for what is locked cannot be read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def json_object(content):
    """The dict in the text or the bytes of a JSON object. Raises ValueError if they hold something else."""
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON, {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError("it is JSON, but not an object")
    return found


def read_json(path, way_out):
    """The dict in a JSON file. Ends the program with one line, which closes with `way_out`, if there is none."""
    path = Path(path)
    if not path.exists():
        sys.exit(f"error: {path} does not exist: {way_out}")
    if not path.is_file():  # a pipe would wait for a writer, for ever
        sys.exit(f"error: {path} is not a file: {way_out}")
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path} cannot be read ({getattr(error, 'strerror', None) or error}): {way_out}")


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
