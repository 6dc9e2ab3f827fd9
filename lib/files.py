"""
Files written atomically, folders with one writer, JSON objects, checksums.

    with written_whole("out/loss.png") as file: file.write(content)
    with owned_folder("out", "out_dir"): ...        # no other run writes there meanwhile
    meta = read_json("data/python/meta.json", "prepare it again")
    digest = sha256_of("data/python/train.bin")

An atomic write goes to a temporary file in the same folder, is flushed to the disk, and is then renamed over the old
file. So at every moment, power cuts included, the name holds either the old content or the new one.
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


def temporary(path):
    """Return the name under which this process, and no other, writes what will become `path`."""
    return Path(f"{path}.{os.getpid()}.tmp")


@contextlib.contextmanager
def written_whole(path, mode="wb", **options):
    """
    Open a file for writing that becomes `path` when the block ends. If the block or the disk fails, the old `path`
    stays untouched, nothing is left behind, and the error goes on to the caller. options: as for open().
    """
    path = os.path.realpath(path)  # of a symbolic link, the target is replaced
    unfinished = temporary(path)
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
            unfinished.unlink()  # only there if something failed


def put_in_place(unfinished, path):
    """Rename a finished file (or folder) to `path`, and flush the rename itself to the disk."""
    os.replace(unfinished, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def owned_folder(folder, setting):
    """
    Make this process the only writer of `folder` inside the block. Create the folder, remove temporary files of dead
    writers, and afterwards remove the folder if nothing was written to it. The system releases the lock when the
    process ends, however it ends. If another process owns the folder, end the program with one line that names
    `setting`.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except UnicodeEncodeError:
        sys.exit(f"error: --{setting} is not UTF-8, and ckpt.pt could not name it: choose a different --{setting}")
    except Timeout:
        sys.exit(
            f"error: {folder} is in use by another process: wait for it, stop it, or choose a different --{setting}"
        )
    except OSError as error:
        sys.exit(f"error: {folder} cannot be written to ({error.strerror}): choose a different --{setting}")
    for leftover in folder.iterdir():
        if re.fullmatch(r".+\.\d+\.tmp", leftover.name) and leftover.is_file():
            leftover.unlink()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()  # while we hold it; filelock never takes a lock on a removed file
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing is in it


def read_json(path, hint):
    """Return the dict in a JSON file. End the program with one line, which closes with `hint`, if there is none."""
    with usable(path, hint):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is JSON, but not an object")
        return content


def sha256_of(path):
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
