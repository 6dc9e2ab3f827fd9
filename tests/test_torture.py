"""torture.py in a short form: every fault once. `make torture` tries each fifty times."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_fault_once():
    command = [sys.executable, "tests/torture.py", "--trials=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    rows = {line[:28].strip(): list(map(int, line[28:].split())) for line in done.stdout.splitlines()[1:]}
    assert len(rows) == 22 and all(row[0] == 1 and row[2:] == [0, 0, 0] for row in rows.values()), done.stdout
    for name in ("SIGTERM", "SIGTERM twice in 50 ms", "Ctrl-C", "SIGHUP", "SIGUSR1"):
        assert rows[name][1] == 0, "a signal lost iterations"
