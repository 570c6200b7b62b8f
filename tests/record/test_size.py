"""Answers stay small whatever the length of the run; the time they take is measured by `make soak`."""

import pytest
from benchmarks.recording import questions, reading

from clinometer.record.read.reader import RunFile
from tests.record.synthetic import synthetic


def rows_read(folder, steps):
    """How many rows each question takes from the file."""
    run = RunFile.open(folder)
    read = {}

    class Counting:
        def __init__(self, connection):
            self.connection, self.rows = connection, 0

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def execute(self, *arguments):
            rows = self.connection.execute(*arguments).fetchall()
            self.rows += len(rows)
            return Fetched(rows)

    class Fetched(list):
        def fetchall(self):
            return list(self)

        def fetchone(self):
            return self[0] if self else None

    counting = run._connection = Counting(run._connection)  # pyright: ignore
    for name, call in questions(run, steps).items():
        counting.rows = 0
        call()
        read[name] = counting.rows
    return read


def test_ten_times_the_steps_do_not_mean_ten_times_the_rows_read(tmp_path):
    short = rows_read(synthetic(tmp_path / "short", steps=2000, layers=1), 2000)
    long = rows_read(synthetic(tmp_path / "long", steps=20_000, layers=1), 20_000)
    assert max(long.values()) <= 16_500
    for name, rows in long.items():
        assert rows <= max(4 * short[name], 5000) or name in ("scalars, 5 names", "scalars, a fifth"), name


@pytest.mark.soak
def test_a_hundred_thousand_steps_of_300_tensors_answer_within_50_ms(tmp_path):
    synthetic(tmp_path, steps=100_000, layers=42)
    slow = {name: busy for name, _, _, busy in reading(tmp_path, 100_000) if busy > 50}
    assert slow == {}
