"""Files from others: whatever is in them, they are read or refused in words, and nothing else happens.

`make test` tries some hundred inputs; `make soak` 100,000 (`CLINOMETER_FUZZ` sets how many for each reader).
"""

import os
import shutil
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import edits

READERS = (
    "config",
    "tokenizer",
    "gpt2",
    "shards",
    "checkpoint",
    "parts",
    "run",
    "llama",
    "sharded",
    "replay",
    "record",
    "corpus",
)
MANY = int(os.environ.get("CLINOMETER_FUZZ", "10000"))
FEW = 40


def try_inputs(reader, ask, tmp_path_factory, count):
    """`ask(folder, only_in=None)`: how many of the reader's questions are answered."""
    place = tmp_path_factory.mktemp("fuzzed")
    folder = place / "folder"
    shutil.copytree(reader.good, folder)
    all_answers = ask(folder)
    assert all_answers > 0
    refused = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count <= FEW,
        suppress_health_check=list(HealthCheck),
    )
    @given(name=st.sampled_from(sorted(reader.files)), how=edits.FILE_EDITS, sealed=st.booleans())
    def attempt(name, how, sealed):
        nonlocal refused
        good = (reader.good / name).read_bytes()
        content = edits.edited_file(good, how, reader.files[name])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reader.good, folder)
        (folder / name).write_bytes(content)
        if sealed:
            reader.seal(folder)
        refused += ask(folder, place) < all_answers

    attempt()
    print(f"{count} inputs, {refused} refused in words: {', '.join(sorted(reader.files))}")
    assert refused > 0  # the edits do reach what the readers look at


@pytest.mark.parametrize("name", READERS)
def test_an_edited_file_is_read_or_refused_in_words(made, asking, tmp_path_factory, name):
    try_inputs(made[name], partial(asking.ask, name), tmp_path_factory, FEW)


@pytest.mark.soak
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_edited_files_are_read_or_refused_in_words(made, asking, tmp_path_factory, name):
    try_inputs(made[name], partial(asking.ask, name), tmp_path_factory, MANY)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])
def test_other_values_in_a_run_file_are_read_over_or_refused_in_words(made, asking, tmp_path_factory, count):
    reader = made["record"]
    place = tmp_path_factory.mktemp("fuzzed")
    folder = place / "folder"

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count <= FEW,
        suppress_health_check=list(HealthCheck),
    )
    @given(edits.SQL_EDITS)
    def attempt(changes):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reader.good, folder)
        edits.edit_database(folder / "run.sqlite", changes)
        asking.ask("record", folder, place)

    attempt()
