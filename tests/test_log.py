"""log.py: rows that survive a resume, whatever columns the file has."""

import csv

import pytest

from lib.log import COLUMNS, open_log, plot_log


def write(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_rows_of_later_iterations_are_cut_off(tmp_path):
    path = tmp_path / "log.csv"
    row, val = ["10", "9.5", "0.1", "1", "", "5", "6"], ["10", "", "", "", "9.4", "", ""]
    write(path, [COLUMNS, ["0", "", "", "", "11", "", ""], row, val, ["20", *row[1:]], ["half"]])
    log, _ = open_log(path, 10)
    log(iter=20, loss=8.5)
    assert read(path) == [COLUMNS, ["0", "", "", "", "11", "", ""], row, ["20", "8.5", "", "", "", "", ""]]


def test_a_new_run_begins_a_new_log(tmp_path):
    write(tmp_path / "log.csv", [COLUMNS, ["10", "9.5", "0.1", "1", "", "5", "6"]])
    open_log(tmp_path / "log.csv", 0)
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
    log, _ = open_log(path, 10)
    log(iter=20, loss=8.5)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name: value for name, value in rows[0].items() if value} == {n: v for n, v in values.items() if v}
    assert rows[1]["loss"] == "8.5" and (rows[1].get("my_metric") or "") == ""
    plot_log(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000
