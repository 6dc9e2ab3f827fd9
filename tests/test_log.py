"""log.py: rows that survive a resume, whatever columns the file has."""

import csv

import pytest

from lib.log import COLUMNS, open_log, plot_log, printer, read_log


def write(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_rows_of_later_iterations_are_cut_off(tmp_path):
    path = tmp_path / "log.csv"
    row, val = ["10", "9.5", "0.1", "1", "", "", "5", "6"], ["10", "", "", "", "9.4", "0.1", "", ""]
    write(path, [COLUMNS, ["0", "", "", "", "11", "", "", ""], row, val, ["20", *row[1:]], ["half"]])
    log, _ = open_log(path, 10, 10, pytest.fail)
    log(iter=20, loss=8.5)
    assert read(path) == [COLUMNS, ["0", "", "", "", "11", "", "", ""], row, ["20", "8.5", "", "", "", "", "", ""]]


def test_a_new_run_begins_a_new_log(tmp_path):
    write(tmp_path / "log.csv", [COLUMNS, ["10", "9.5", "0.1", "1", "", "", "5", "6"]])
    open_log(tmp_path / "log.csv", 0, 10, pytest.fail)
    assert read(tmp_path / "log.csv") == [COLUMNS]


@pytest.mark.parametrize(
    "columns",
    [
        ["iter", "loss", "my_metric", "lr", "grad_norm", "val_loss", "ms", "tok_per_s"],  # one more than today's
        ["val_loss", "loss", "iter"],  # fewer, in another order
    ],
)
def test_other_columns_than_todays_keep_their_rows(tmp_path, columns):
    path = tmp_path / "log.csv"
    values = {name: f"{i}.5" for i, name in enumerate(columns)} | {"iter": "10", "val_loss": ""}
    write(path, [columns, [values[name] for name in columns]])
    log, _ = open_log(path, 10, 10, pytest.fail)
    log(iter=20, loss=8.5)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name: value for name, value in rows[0].items() if value} == {n: v for n, v in values.items() if v}
    assert rows[1]["loss"] == "8.5" and (rows[1].get("my_metric") or "") == ""
    plot_log(path, tmp_path / "loss.png", 0.4, 10, pytest.fail)
    assert (tmp_path / "loss.png").stat().st_size > 5_000


GOOD = [["10", "9.5", "0.1", "1", "", "", "5", "6"], ["20", "8.5", "0.1", "1", "", "", "5", "6"]]


@pytest.mark.parametrize("bad", [
    b"\xff\xfe\x00junk", b"15,letters,0.1,1,,,5,6", b"x" * 200_000, b"-3,1,1,1,,,5,6", b"15,1", b"1e3,1,1,1,,,5,6",
    b"15,1,1,1,,,5,6,7", b'15,"1', "\u0661\u0665,1,1,1,,,5,6".encode(), b"\x00\x00\x00", "15,\u0661,1,1,,,5,6".encode(),
])  # fmt: skip
def test_foreign_content_ends_nothing_and_is_not_lost(tmp_path, bad):
    path, said = tmp_path / "log.csv", []
    write(path, [COLUMNS, *GOOD])
    lines = path.read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:2], bad + b"\r\n", *lines[2:]])
    path.write_bytes(content)
    log, sync = open_log(path, 20, 10, said.append)
    log(iter=30, loss=7.5)
    sync()
    assert [row[:2] for row in read(path)] == [["iter", "loss"], ["10", "9.5"], ["20", "8.5"], ["30", "7.5"]]
    assert len(said) == 1 and "cannot be read" in said[0]
    assert (tmp_path / "log.unreadable.csv").read_bytes() == content
    path.write_bytes(content)  # in the middle of a run
    plot_log(path, tmp_path / "loss.png", 0.4, 10, pytest.fail)


@pytest.mark.parametrize("rows, gap", [([], "1 to 20"), (GOOD[:1], "11 to 20")])
def test_missing_rows_are_told(tmp_path, rows, gap):
    """As after a power cut, when the checkpoint was on the disk and the rows were not."""
    said = []
    if rows:
        write(tmp_path / "log.csv", [COLUMNS, *rows])
    open_log(tmp_path / "log.csv", 25, 10, said.append)
    assert said == [f"note: {tmp_path}/log.csv has no rows from iteration {gap}: the curve has a gap there"]


def test_a_plot_that_cannot_be_written_ends_nothing(tmp_path):
    said = []
    write(tmp_path / "log.csv", [COLUMNS, *GOOD])
    (tmp_path / "loss.png").mkdir()
    plot_log(tmp_path / "log.csv", tmp_path / "loss.png", 0.4, None, said.append)
    assert len(said) == 1 and "loss.png could not be written (Is a directory)" in said[0]
    assert read_log(tmp_path / "none.csv") == ([], [], 0)


def test_a_broken_stdout_is_told_once(capfd, monkeypatch):
    class Bar:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("lib.log.silence_stdout", lambda: None)
    say = printer(Bar())
    say("one")
    assert capfd.readouterr().err == "note: no more output, stdout is gone (Broken pipe); the run continues\n"
