"""What a stranger's small file may cost: not more than a share of itself, whatever it claims to be.

Each bomb is read in a child of a process of its own (asking.py), whose address space ends 512 MiB beyond
what it has; how much became resident is the system's own figure.
"""

import shutil
import sys

import pytest

from tests.fuzz.bombs import BOMBS

BASE, FACTOR = 64 << 20, 50
"""What reading may take: a JSON list of short texts is some fifty times its file in Python."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's /proc")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_or_refused_in_words_within_a_share_of_its_size(made, asking, tmp_path, name):
    reader, make = BOMBS[name]
    folder = tmp_path / "folder"
    shutil.copytree(made[reader].good, folder)
    all_answers = asking.ask(reader, folder)  # and whatever the first use imports is no bomb's
    assert all_answers > 0
    make(folder)
    made[reader].seal(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    told = asking.measure(reader, folder)
    assert told["outcome"] == "spoke", told
    assert told["grew"] < BASE + FACTOR * size, told


def test_the_measure_sees_what_is_taken(asking, tmp_path):
    told = asking.measure("takes 200 MiB", tmp_path)
    assert told["outcome"] == "spoke"
    assert 196 << 20 <= told["grew"] < 232 << 20  # the system counts in lots
    assert asking.measure("takes 1 GiB", tmp_path)["outcome"] == "MemoryError: "
