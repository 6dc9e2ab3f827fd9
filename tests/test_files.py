"""lib/files.py: atomic writes, and one writer per folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.files import write_atomically

ROOT = Path(__file__).parent.parent


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    with write_atomically(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), write_atomically(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with write_atomically(path, "w", newline="") as file:
        file.write("new\n")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new\n"


def test_the_target_of_a_link_is_replaced_and_its_mode_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a").write_bytes(b"old")
    (tmp_path / "disk/a").chmod(0o600)
    (tmp_path / "a").symlink_to("disk/a")
    with write_atomically(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "disk/a").read_bytes() == b"new" and (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk/a").stat().st_mode & 0o777 == 0o600


def test_the_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    """Without it, a power cut can undo the rename."""
    events = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.path.isdir(f"/proc/self/fd/{fd}")), fsync(fd)))
    with write_atomically(tmp_path / "a") as file:
        file.write(b"x")
    assert events == [False, "rename", True]  # fsync of a folder?


WRITER = """
import sys
from lib.files import lock_folder
with lock_folder(sys.argv[1], "out_dir"):
    print("mine", flush=True)
    sys.stdin.read()
"""


def start_writer(folder):
    """Start a process that locks the folder."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", WRITER, folder], cwd=ROOT, text=True, **pipes)


def test_a_folder_has_one_writer(tmp_path):
    with start_writer(tmp_path / "out") as first:
        assert first.stdout.readline() == "mine\n"
        with start_writer(tmp_path / "out") as second:
            errors = second.communicate()[1]
        hint = "wait for it, stop it, or choose a different --out_dir"
        assert errors == f"error: {tmp_path}/out is in use by another process: {hint}\n" and second.returncode == 1
        first.kill()  # this releases the lock
    (tmp_path / "out" / f"ckpt.pt.{first.pid}.tmp").write_bytes(b"left by a dead writer")
    (tmp_path / "out" / "notes.tmp").write_bytes(b"the user's own")
    with start_writer(tmp_path / "out") as third:
        assert third.stdout.readline() == "mine\n"
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "notes.tmp"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.tmp"]
