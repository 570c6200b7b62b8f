"""Whatever lies where a run file should be: it reads, or an InputError says what is wrong."""

import random
import sqlite3
import time

import pytest

from clinometer.messages import InputError
from clinometer.record.format import schema
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from tests.record.synthetic import synthetic

ASKED = (
    lambda run: run.info(),
    lambda run: run.version(),
    lambda run: run.tensors(),
    lambda run: run.scalars(run.scalar_names()),
    lambda run: run.scalars(run.scalar_names(), points=3),
    lambda run: run.series([0], "grad_norm"),
    lambda run: run.series([0, 1], "update_ratio", points=2),
    lambda run: run.grid("grad_rms", columns=2),
    lambda run: run.grid("cosine"),
    lambda run: run.row(7),
    lambda run: run.rows(limit=50),
    lambda run: run.histograms(0, "grad"),
    lambda run: run.alerts(),
    lambda run: run.events(),
    lambda run: run.pinned(),
    lambda run: run.weight(1, [3, 5]),
)


def ask_everything(folder):
    """How many questions were answered; each of the others must have been refused in words."""
    answered, refused = 0, []
    try:
        run = RunFile.open(folder)
    except InputError as error:
        said = str(error)
        return 0 if said else -1
    for question in ASKED:
        try:
            question(run)
            answered += 1
        except InputError as error:
            refused.append(str(error) and error.render("zh"))
    run.close()
    assert all(refused)
    return answered


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = synthetic(tmp_path_factory.mktemp("small"), steps=300, layers=1)
    data = (folder / "run.sqlite").read_bytes()
    assert ask_everything(folder) == len(ASKED)
    return data


def test_a_file_cut_at_any_place_is_refused_in_words(small, tmp_path):
    page = schema.PAGE_SIZE
    cuts = {0, 1, 15, 16, 99, 100, 101, page - 1, page, page + 1, 2 * page, len(small) - page, len(small) - 1}
    cuts |= set(range(3 * page, len(small), 23 * page + 7))
    for cut in sorted(cuts):
        (tmp_path / "run.sqlite").write_bytes(small[:cut])
        answered = ask_everything(tmp_path)
        assert answered < len(ASKED) or cut > len(small) - 2 * page, cut


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_are_refused_in_words_or_read_over(small, tmp_path, seed):
    rng = random.Random(seed)
    data = bytearray(small)
    places = 200 if seed % 2 else len(data)
    for _ in range(rng.choice([1, 3, 30, 300])):
        data[rng.randrange(places)] ^= 1 << rng.randrange(8)
    (tmp_path / "run.sqlite").write_bytes(data)
    begin = time.process_time()
    ask_everything(tmp_path)
    assert time.process_time() - begin < 60


def test_pages_of_noise_or_of_another_place_are_refused_in_words_or_read_over(small, tmp_path):
    rng = random.Random(0)
    page = schema.PAGE_SIZE
    for _ in range(15):
        data = bytearray(small)
        at = rng.randrange(1, len(data) // page) * page
        other = rng.randrange(len(data) // page) * page
        data[at : at + page] = rng.randbytes(page) if rng.random() < 0.5 else small[other : other + page]
        (tmp_path / "run.sqlite").write_bytes(data)
        ask_everything(tmp_path)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("steps", "statistics", b"\x00" * 7),
        ("steps", "statistics", "text"),
        ("steps", "scalars", b"\x00" * 4096),
        ("steps", "time", "never"),
        ("histograms", "counts", b"\x01\x00\x00\x00\x04garbage"),
        ("histograms", "counts", b""),
        ("alerts", "data", "{"),
        ("alerts", "data", "[" * 100_000),
        ("events", "data", "nonsense"),
        ("tensors", "shape", "?"),
        ("tensors", "numel", "many"),
        ("meta", "value", "{"),
        ("meta", "value", '"x"'),
        ("pins", "position", "]"),
        ("weights", "numbers", b"\x00"),
        ("rollup_16", "cells", b"\x00" * 3),
        ("scalar_rollup_16", "cells", b"\x00" * 9),
    ],
)
def test_values_of_another_kind_are_refused_in_words_or_read_over(small, tmp_path, table, column, value):
    (tmp_path / "run.sqlite").write_bytes(small)
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
    connection.commit()
    connection.close()
    assert ask_everything(tmp_path) < len(ASKED) or (table, column) in {("steps", "time"), ("meta", "value")}


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda path: None, "record.missing"),
        (lambda path: path.write_bytes(b""), "record.empty"),
        (lambda path: path.write_text("loss: 3.1\n" * 1000), "record.not_a_run_file"),
        (lambda path: path.write_bytes(b"\x00" * 10_000), "record.not_a_run_file"),
        (lambda path: path.mkdir(), "record.not_a_run_file"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE t (x)"), "record.not_a_run_file"),
    ],
)
def test_what_is_no_run_file_is_told_apart(tmp_path, make, key):
    make(tmp_path / "run.sqlite")
    with pytest.raises(InputError) as caught:
        RunFile.open(tmp_path)
    assert caught.value.key == key


def test_a_folder_that_is_not_there_is_told_apart(tmp_path):
    with pytest.raises(InputError) as caught:
        RunFile.open(tmp_path / "nowhere")
    assert caught.value.key == "record.no_folder"


def test_a_file_with_a_program_in_it_is_not_run(small, tmp_path):
    """A view in place of a table could compute for ever."""
    (tmp_path / "run.sqlite").write_bytes(small)
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    connection.execute("DROP TABLE alerts")
    connection.execute("CREATE VIEW alerts AS SELECT * FROM events, events AS b, events AS c")
    connection.commit()
    connection.close()
    with pytest.raises(InputError) as caught:
        RunFile.open(tmp_path)
    assert caught.value.key == "record.not_a_run_file"


def test_a_damaged_file_is_not_continued_and_not_removed(small, tmp_path):
    data = small[: len(small) // 2]
    (tmp_path / "run.sqlite").write_bytes(data)
    for continue_from in (None, 10):
        with pytest.raises(InputError):
            Recorder(tmp_path, continue_from)
    assert (tmp_path / "run.sqlite").read_bytes() == data
