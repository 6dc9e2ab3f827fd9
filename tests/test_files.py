"""files.py: whole or not at all, and one writer a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.files import owned_folder, temporary, written_whole

ROOT = Path(__file__).parent.parent


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    with written_whole(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError):
        with written_whole(path) as file:
            file.write(b"half")
            raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with written_whole(path, "w", newline="") as file:
        file.write("new\n")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new\n"


def test_the_target_of_a_link_is_replaced_and_its_mode_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a").write_bytes(b"old")
    (tmp_path / "disk/a").chmod(0o600)
    (tmp_path / "a").symlink_to("disk/a")
    with written_whole(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "disk/a").read_bytes() == b"new" and (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk/a").stat().st_mode & 0o777 == 0o600


def test_the_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    """Without it, a power cut can undo the rename."""
    events = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("folder" if is_folder(fd) else "file"), fsync(fd)))
    with written_whole(tmp_path / "a") as file:
        file.write(b"x")
    assert events == ["file", "rename", "folder"]


def is_folder(fd):
    return os.path.isdir(f"/proc/self/fd/{fd}")


OWN = """
import sys
from lib.files import owned_folder
with owned_folder(sys.argv[1], "out_dir"):
    print("mine", flush=True)
    sys.stdin.read()
"""


def other(folder):
    """A process that wants to write to the folder."""
    return subprocess.Popen(
        [sys.executable, "-c", OWN, folder], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_folder_has_one_writer(tmp_path):
    first = other(tmp_path / "out")
    assert first.stdout.readline() == "mine\n"
    second = other(tmp_path / "out")
    _, errors = second.communicate()
    assert second.returncode == 1
    assert errors == (
        f"error: {tmp_path}/out is in use by another process: wait for it, stop it, or choose a different --out_dir\n"
    )
    first.kill()  # death releases the lock
    first.wait()
    (tmp_path / "out" / temporary("ckpt.pt")).write_bytes(b"left by a dead writer")
    (tmp_path / "out" / "notes.tmp").write_bytes(b"the user's own")
    third = other(tmp_path / "out")
    assert third.stdout.readline() == "mine\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "notes.tmp"]
    third.communicate()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.tmp"]
    for process in (first, third):
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_a_folder_in_which_nothing_was_written_goes(tmp_path):
    with pytest.raises(SystemExit):
        with owned_folder(tmp_path / "out", "out_dir"):
            sys.exit("error: no data")
    assert list(tmp_path.iterdir()) == []
