import io
import os
import sys
import types
from pathlib import Path

import pytest

from clinometer.messages import InputError
from clinometer.text.corpus import END_OF_TEXT, corpus_of, open_corpus

BLOCK = 1 << 20


def refused(spec: str | Path) -> InputError:
    """The error that opening and reading `spec` gives; it must be a sentence in both languages."""
    with pytest.raises(InputError) as caught:
        for _ in open_corpus(spec).pieces():
            pass
    for language in ("en", "zh"):
        assert "{" not in caught.value.render(language)
    return caught.value


def test_a_file_is_split_into_documents_at_end_of_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(f"one{END_OF_TEXT}\ntwo\n{END_OF_TEXT}{END_OF_TEXT}three{END_OF_TEXT}")
    corpus = open_corpus(file)
    assert list(corpus.documents()) == ["one", "\ntwo\n", "three"]
    assert list(corpus.documents()) == ["one", "\ntwo\n", "three"], "a corpus can be read again"
    assert corpus.size == file.stat().st_size


@pytest.mark.parametrize("offset", range(-14, 3))
def test_a_marker_across_two_blocks_is_still_one_marker(tmp_path, offset):
    before = "x" * (BLOCK + offset)
    (tmp_path / "a.txt").write_text(f"{before}{END_OF_TEXT}after")
    assert list(open_corpus(tmp_path / "a.txt").documents()) == [before, "after"]


@pytest.mark.parametrize("offset", [-3, -2, -1, 0])
def test_a_character_across_two_blocks_is_still_one_character(tmp_path, offset):
    text = "x" * (BLOCK + offset) + "🧗🏽‍♀️ 坡度" * 3
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "".join(open_corpus(tmp_path / "a.txt").documents()) == text


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path):
    (tmp_path / "a.txt").write_text("x" * (5 * BLOCK))
    assert max(len(text) for text, _ in open_corpus(tmp_path / "a.txt").pieces()) <= 2 * BLOCK


def test_newlines_are_kept_and_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\xef\xbb\xbfd")
    assert list(open_corpus(tmp_path / "a.txt").documents()) == ["a\r\nb\rc\n\ufeffd"]


def test_a_missing_file_is_named():
    assert refused("no/such/file.txt").key == "text.missing"
    assert refused("/no/such/folder/").values["path"] == "/no/such/folder/"
    assert refused("x" * 5000).key in ("text.unreadable", "text.missing", "text.missing_or_dataset")
    assert refused("a\0b").key in ("text.unreadable", "text.missing")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert refused(tmp_path / "a.txt").key == "text.empty"


@pytest.mark.parametrize("before", [b"text ", b"x" * BLOCK])
def test_a_binary_file_is_refused_with_the_place_of_its_zero_byte(tmp_path, before):
    (tmp_path / "a.bin").write_bytes(before + b"\0more")
    error = refused(tmp_path / "a.bin")
    assert (error.key, error.values["offset"]) == ("text.binary", len(before))


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"caf\xe9 au lait", 3),
        (b"x" * BLOCK + b"\xff", BLOCK),
        (b"x" * (BLOCK - 1) + b"\xe5\x9d", BLOCK - 1),
        (b"x" * (BLOCK - 1) + b"\xe5zz", BLOCK - 1),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_the_place_of_the_first_wrong_byte(tmp_path, content, offset):
    (tmp_path / "a.txt").write_bytes(content)
    error = refused(tmp_path / "a.txt")
    assert (error.key, error.values["offset"]) == ("text.not_utf8", offset)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_folder_gives_its_text_files_and_counts_what_it_skipped(folder):
    corpus = open_corpus(folder)
    assert list(corpus.documents()) == ["second", "first"]
    assert (corpus.files, corpus.size) == (2, 11)
    assert corpus.skipped == {"binary": 1, "not-utf-8": 1, "empty": 1, "not-a-file": 2}


def test_a_glob_gives_what_it_matches_in_sorted_order(folder):
    assert list(open_corpus(f"{folder}/*.txt").documents()) == ["second"]
    assert list(open_corpus(f"{folder}/**/*.md").documents()) == ["first"]
    assert refused(f"{folder}/*.rst").key == "text.no_match"


def test_a_folder_without_text_is_refused(tmp_path):
    assert refused(tmp_path).key == "text.no_files"
    (tmp_path / "a.bin").write_bytes(b"\0")
    assert refused(tmp_path).values["skipped"] == 1


def test_standard_input_can_be_read_twice(monkeypatch):
    text = f"one{END_OF_TEXT}two" + "x" * BLOCK
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    corpus = open_corpus("-")
    both = zip(corpus.documents(), corpus.documents(), strict=True)  # two readers at once
    assert list(both) == [("one", "one"), ("two" + "x" * BLOCK,) * 2]
    assert corpus.size == len(text)


@pytest.mark.parametrize(("content", "key"), [(b"", "text.empty"), (b"a\0", "text.binary")])
def test_unusable_standard_input_is_refused(monkeypatch, content, key):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    assert refused("-").key == key


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd")
def test_a_pipe_given_by_the_shell_is_read_like_standard_input():
    receiver, sender = os.pipe()
    os.write(sender, b"from a pipe")
    os.close(sender)
    try:
        assert list(open_corpus(f"/dev/fd/{receiver}").documents()) == ["from a pipe"]
    finally:
        os.close(receiver)


def test_python_is_the_standard_library_without_its_tests():
    corpus = open_corpus("python")
    source = "".join(corpus.documents())
    assert corpus.files > 300
    assert "def dumps(obj, *, skipkeys=False" in source, "json is there"
    assert "class TestCase(unittest.TestCase" not in source
    assert source == "".join(corpus.documents())


def test_an_unknown_name_says_how_to_install_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused("somebody/stories")
    assert error.key == "text.missing_or_dataset"
    assert "clinometer[datasets]" in str(error)


def dataset_module(rows, dtypes):
    class Rows(list):
        def __init__(self, rows):
            super().__init__(rows)
            self.features = {name: types.SimpleNamespace(dtype=dtype) for name, dtype in dtypes.items()}

    def load_dataset(name, split):
        assert (name, split) == ("somebody/stories", "train")
        if rows is None:
            raise ConnectionError("no network\ndetails")
        return Rows(rows)

    return types.SimpleNamespace(load_dataset=load_dataset)


def test_a_dataset_gives_its_text_column(monkeypatch):
    rows = [{"id": "1", "text": "one"}, {"id": "2", "text": None}, {"id": "3", "text": "three"}]
    module = dataset_module(rows, {"id": "string", "text": "string"})
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(open_corpus("somebody/stories").documents()) == ["one", "three"]


def test_a_dataset_without_text_or_network_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", dataset_module([], {"pixels": "int64"}))
    assert refused("somebody/stories").values["columns"] == "pixels"
    monkeypatch.setitem(sys.modules, "datasets", dataset_module(None, {}))
    assert refused("somebody/stories").values["reason"] == "ConnectionError: no network"


def test_documents_in_memory_must_be_well_formed():
    assert list(corpus_of(["a", "", "b"]).documents()) == ["a", "b"]
    with pytest.raises(InputError) as caught:
        corpus_of(["ok", "x\ud800"])
    assert (caught.value.key, caught.value.values["index"]) == ("text.surrogate", 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    assert refused(tmp_path / "a.txt").key == "text.unreadable"
    assert refused(tmp_path).key == "text.no_files"
