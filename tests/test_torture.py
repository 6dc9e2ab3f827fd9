"""torture.py in a short form: every fault once, eight spoilt files a kind. `make torture` tries fifty times that."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_fault_once():
    command = [sys.executable, "tests/torture.py", "--trials=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines()[1:] if " skipped: " not in line]
    rows = {line[:28].strip(): [int(cell) for cell in line[28:].split()[:5]] for line in lines}
    assert len(rows) >= 28 and all(row[2:] == [0, 0, 0] for row in rows.values()), done.stdout
    assert all(row[0] == (8 if name.endswith(", spoilt") else 1) for name, row in rows.items()), done.stdout
    for name in ("SIGTERM", "SIGTERM twice in 50 ms", "Ctrl-C", "SIGHUP", "SIGUSR1"):
        assert rows[name][1] == 0, "a signal lost iterations"
