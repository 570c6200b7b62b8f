import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinometer.messages import InputError
from clinometer.text import encoding
from clinometer.text.bulk_encoder import BulkEncoder, IdsDiffer
from clinometer.text.corpus import END_OF_TEXT, corpus_of, open_corpus
from clinometer.text.encoding import encode_corpus
from clinometer.text.token_shards import TokenData, Tokens, find_tokens
from clinometer.text.tokenizer import byte_tokenizer, from_gpt2_files
from clinometer.text.validation_split import split


def refused(call, *arguments, **settings):
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    for language in ("en", "zh"):
        assert caught.value.render(language)
    return caught.value


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def expected(corpus, tokenizer, fraction=0.1):
    """Ids of each side, the plain way: each document whole, by the tokenizer itself."""
    chosen = split(corpus, fraction)
    ids = {"train": [], "validation": []}
    run = ""
    before = None
    for side, text, ends in [*chosen.parts(corpus), (None, "", False)]:
        if before is not None and side != before:
            ids[before] += tokenizer.encode(run)
            run = ""
        run += text
        before = side
        if ends:
            ids[side] += tokenizer.encode(run)
            ids[side] += [tokenizer.end_of_text_id] if chosen.documents > 1 else []
            run, before = "", None
    return ids


def assert_encoded(data, ids):
    assert data.train[:].tolist() == ids["train"]
    assert data.validation[:].tolist() == ids["validation"]
    data.verify()


def test_many_documents_are_each_followed_by_end_of_text(trained, sample, tmp_path):
    corpus = corpus_of([sample[i : i + 997] for i in range(0, len(sample), 997)])
    data = encode_corpus(corpus, trained, tmp_path)
    assert data.header.split_rule == "hash"
    assert_encoded(data, expected(corpus, trained))
    all_ids = np.concatenate([data.train[:], data.validation[:]])
    assert (all_ids == trained.end_of_text_id).sum() == data.header.documents == 301


def test_one_document_has_no_end_of_text(trained, sample, tmp_path):
    data = encode_corpus(corpus_of([sample]), trained, tmp_path)
    cut = int(len(sample) * 0.9)
    assert data.train[:].tolist() == trained.encode(sample[:cut])
    assert data.validation[:].tolist() == trained.encode(sample[cut:])


def test_a_file_longer_than_a_batch_has_the_ids_of_the_whole_text(trained, sample, tmp_path):
    (tmp_path / "a.txt").write_text(sample * 12, encoding="utf-8")
    data = encode_corpus(open_corpus(tmp_path / "a.txt"), trained, tmp_path / "tokens", workers=2)
    cut = int(len(sample * 12) * 0.9)
    assert cut > 3 << 20
    assert data.train[:].tolist() == trained.encode((sample * 12)[:cut])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.sampled_from("ab \n坡🧗"), max_size=30), max_size=30), st.integers(1, 7))
def test_any_documents_in_any_batches_give_the_plain_ids(trained, tmp_path_factory, documents, batch):
    corpus = corpus_of(["a beginning", *documents, "an end of it"])
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_BATCH_CHARACTERS", batch)
        data = encode_corpus(corpus, trained, folder, shard_tokens=batch)
    assert_encoded(data, expected(corpus, trained))
    assert all(shard.tokens <= batch for shard in data.header.train)


def test_slices_cross_shards(trained, sample, tmp_path):
    data = encode_corpus(corpus_of([sample]), trained, tmp_path, shard_tokens=1000)
    whole = np.array(trained.encode(sample[: int(len(sample) * 0.9)]))
    assert len(data.header.train) == -(-len(whole) // 1000) > 10
    assert len(data.train) == len(whole)
    for start, stop in [(0, 0), (0, 1), (999, 1001), (995, 3005), (1000, 2000), (-5, None), (5, 3)]:
        assert np.array_equal(data.train[start:stop], whole[start:stop])
    assert data.train[:3].dtype == np.uint16
    with pytest.raises(ValueError, match="step"):
        data.train[::2]


def test_a_vocabulary_above_65536_needs_four_bytes(tmp_path):
    letters = {character: i for i, character in enumerate(byte_tokenizer()._library.get_vocab())}
    letters |= {f"filler{i}": i for i in range(len(letters), 70_000)}
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    letters[END_OF_TEXT] = 70_000
    vocab.write_text(json.dumps(letters), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = from_gpt2_files(vocab, merges)
    data = encode_corpus(corpus_of(["abc"] * 30 + ["def"]), tokenizer, tmp_path / "tokens")
    assert data.header.dtype == "uint32"
    assert 70_000 in data.train[:].tolist()


def test_finished_tokens_are_used_again_and_other_inputs_are_not(trained, sample, tmp_path, monkeypatch):
    corpus = corpus_of([sample])
    first = encode_corpus(corpus, trained, tmp_path)
    monkeypatch.setattr(encoding, "_build", lambda *_: pytest.fail("encoded again"))
    assert encode_corpus(corpus, trained, tmp_path).folder == first.folder
    monkeypatch.undo()
    others = [
        encode_corpus(corpus_of([sample + "."]), trained, tmp_path),
        encode_corpus(corpus, byte_tokenizer(), tmp_path),
        encode_corpus(corpus, trained, tmp_path, fraction=0.2),
    ]
    assert len({data.folder for data in [first, *others]}) == 4


@pytest.mark.parametrize("damage", ["truncate", "header", "remove"])
def test_damaged_tokens_are_refused_when_opened_and_made_again_when_asked_for(
    trained, sample, tmp_path, damage
):
    corpus = corpus_of([sample])
    data = encode_corpus(corpus, trained, tmp_path)
    shard, header = data.folder / "train-00000.bin", data.folder / "header.json"
    whole = shard.read_bytes()
    if damage == "truncate":
        shard.write_bytes(whole[:-2])
    elif damage == "remove":
        shard.unlink()
    else:
        header.write_text(header.read_text()[:-20])
    assert refused(TokenData.open, data.folder).key == "text.shards_broken"
    assert encode_corpus(corpus, trained, tmp_path).folder == data.folder
    assert shard.read_bytes() == whole
    assert refused(TokenData.open, tmp_path / "nothing").key == "text.shards_missing"


def test_verify_finds_one_changed_byte(trained, sample, tmp_path):
    data = encode_corpus(corpus_of([sample]), trained, tmp_path, shard_tokens=10_000)
    path = data.folder / "train-00003.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    assert refused(TokenData.open(data.folder).verify).values["path"] == path


def test_an_id_outside_the_vocabulary_is_refused_where_it_is_used():
    tokens = Tokens([np.array([1, 2, 3], np.uint16), np.array([4, 999], np.uint16)], 100, "here", "uint16")
    assert tokens[0:4].tolist() == [1, 2, 3, 4]
    assert refused(tokens.__getitem__, slice(2, 5)).values["value"] == 999


@pytest.mark.parametrize("text", ["x", "xy", "   "])
def test_a_corpus_of_a_token_or_two_is_refused_and_leaves_nothing(trained, tmp_path, text):
    assert refused(encode_corpus, corpus_of([text]), trained, tmp_path).key == "text.few_tokens"
    assert visible(tmp_path) == []


def test_documents_need_a_tokenizer_that_can_keep_them_apart(sample, tmp_path):
    letters = {c: i for c, i in byte_tokenizer()._library.get_vocab().items() if c != END_OF_TEXT}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    error = refused(encode_corpus, corpus_of(["one text", "another"]), tokenizer, tmp_path)
    assert error.key == "text.no_end_of_text"
    assert len(encode_corpus(corpus_of([sample]), tokenizer, tmp_path / "tokens").train) == 270_000


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_encoding_leaves_nothing(trained, sample, tmp_path, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(encoding._Writer, "close", fail)
    with pytest.raises((KeyboardInterrupt, InputError)) as caught:
        encode_corpus(corpus_of([sample]), trained, tmp_path)
    assert visible(tmp_path) == []
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
def test_a_disk_that_takes_no_more_bytes_gives_an_error_and_leaves_nothing(tmp_path):
    program = (
        "import resource, signal, sys\nfrom clinometer.messages import InputError\n"
        "from clinometer.text.corpus import corpus_of\nfrom clinometer.text.encoding import encode_corpus\n"
        "from clinometer.text.tokenizer import byte_tokenizer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    encode_corpus(corpus_of(['text ' * 100_000]), byte_tokenizer(), sys.argv[1])\n"
        "except InputError as error:\n    print(error.key)"
    )
    command = [sys.executable, "-c", program, tmp_path]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout == "text.cannot_write\n"
    assert visible(tmp_path) == []


def test_a_target_that_is_a_file_is_refused(trained, sample, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(encode_corpus, corpus_of([sample]), trained, tmp_path / "file").key == "text.cannot_write"


@pytest.mark.parametrize("more", ["more text", f"{END_OF_TEXT}a\n" * 30])
def test_a_file_that_grows_meanwhile_is_noticed(trained, sample, tmp_path, monkeypatch, more):
    file = tmp_path / "a.txt"
    file.write_text(f"one{END_OF_TEXT}" * 10 + "".join(f"{i}{END_OF_TEXT}" for i in range(100)))

    def split_then_grow(corpus, fraction):
        chosen = split(corpus, fraction)
        with file.open("a") as stream:
            stream.write(more)
        return chosen

    monkeypatch.setattr(encoding, "split", split_then_grow)
    error = refused(encode_corpus, open_corpus(file), trained, tmp_path / "tokens")
    assert error.key == "text.changed"
    assert visible(tmp_path / "tokens") == []


SLOW = """
import sys, time
from clinometer.text import encoding
from clinometer.text.corpus import corpus_of
from clinometer.text.tokenizer import byte_tokenizer
def slow(*values):
    print("encoding", flush=True)
    time.sleep(float(sys.argv[2]))
data = encoding.encode_corpus(corpus_of(["text " * 1000]), byte_tokenizer(), sys.argv[1], progress=slow)
data.verify()
print("done", len(data.train), flush=True)
"""


def start(folder: Path, seconds: float):
    command = [sys.executable, "-c", SLOW, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_9_leaves_nothing_that_passes_for_finished_and_the_next_run_cleans_up(tmp_path):
    process = start(tmp_path, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "encoding\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (orphan,) = visible(tmp_path)
    assert ".building-" in orphan
    data = encode_corpus(corpus_of(["another text " * 1000]), byte_tokenizer(), tmp_path)
    assert visible(tmp_path) == [data.folder.name], "also when the next run is for another text"


def test_two_processes_at_once_both_end_well_and_one_encodes(tmp_path):
    processes = [start(tmp_path, 1.0) for _ in range(3)]
    shown = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all("done 4500\n" in text for text in shown)
    assert sum("encoding" in text for text in shown) == 1
    assert len(visible(tmp_path)) == 1


def test_a_build_under_way_is_not_swept_away(tmp_path):
    process = start(tmp_path, 1.5)
    assert process.stdout is not None
    assert process.stdout.readline() == "encoding\n"
    encode_corpus(corpus_of(["another text " * 1000]), byte_tokenizer(), tmp_path)
    assert "done 4500" in process.communicate()[0]
    assert len(visible(tmp_path)) == 2


def test_the_fast_encoder_gives_the_ids_of_the_tokenizer(trained, sample):
    encoder = BulkEncoder(trained)
    assert encoder.fast
    pieces = [sample, "", "<|end|>" * 5 + END_OF_TEXT, "x" * 20_000, " " * 5000 + "a", "\u3000坡 度\r\n'RE's"]
    for piece, ids in zip(pieces, encoder.encode_checked(pieces), strict=True):
        assert ids.tolist() == trained.encode(piece)


@pytest.fixture
def contrary(tmp_path):
    """A vocabulary in the order of its merges, in which tiktoken's rule still gives other ids."""
    table = byte_tokenizer()._library.get_vocab()
    for token in ("bc", "ab", "abc"):
        table[token] = len(table)
    (tmp_path / "vocab.json").write_text(json.dumps(table))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\na b\nab c\n")
    return from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_ids_that_differ_are_noticed_and_the_tokenizers_own_are_written(contrary, tmp_path):
    text = "abc " * 1000
    encoder = BulkEncoder(contrary)
    assert encoder.fast
    assert len(encoder.encode([text])[0]) < len(contrary.encode(text))
    with pytest.raises(IdsDiffer):
        encoder.encode_checked([text])
    data = encode_corpus(corpus_of([text]), contrary, tmp_path / "tokens")
    assert data.train[:].tolist() == contrary.encode(text[:3600])


def test_merges_out_of_order_rule_the_fast_encoder_out(trained, tmp_path):
    model = json.loads(trained.to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in reversed(model["merges"]))
    (tmp_path / "merges.txt").write_text(lines, encoding="utf-8")
    assert trained.mergeable_ranks is not None
    assert from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt").mergeable_ranks is None


def test_progress_ends_at_the_whole_text(trained, sample, tmp_path):
    calls = []
    encode_corpus(corpus_of([sample]), trained, tmp_path, progress=lambda *values: calls.append(values))
    assert calls[-1] == (len(sample), len(sample))


def test_the_header_names_no_folder_of_the_machine(trained, sample, tmp_path):
    (tmp_path / "story.txt").write_text(sample, encoding="utf-8")
    data = encode_corpus(open_corpus(tmp_path / "story.txt"), trained, tmp_path / "tokens")
    assert data.header.corpus == "story.txt"
    assert str(tmp_path) not in (data.folder / "header.json").read_text()
    assert oct((tmp_path / "tokens" / data.folder.name).stat().st_mode)[-3:] == "755"


def count_damages_found(data, stride):
    """Every prefix, and a flipped bit in every byte, of each file; of large ones each `stride`-th."""
    count = 0
    for path in sorted(data.folder.iterdir()):
        content = path.read_bytes()
        for at in sorted({*range(0, len(content), stride), len(content) - 1}):
            changed = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
            for damage in (content[:at], changed):
                path.write_bytes(damage)
                try:
                    opened = TokenData.open(data.folder)
                    opened.verify()
                except InputError:
                    count += 1
                else:  # white space in the header, or an upper-case letter of an escape
                    assert path.name == "header.json", (path.name, at)
                    assert opened.header == data.header, at
        path.write_bytes(content)
    return count


def test_a_prefix_and_a_flipped_bit_at_many_places_are_found(trained, sample, tmp_path):
    data = encode_corpus(corpus_of([sample[:3000]]), trained, tmp_path)
    assert count_damages_found(data, 23) > 100


@pytest.mark.soak
def test_every_prefix_and_a_flipped_bit_in_every_byte_are_found(trained, sample, tmp_path):
    data = encode_corpus(corpus_of([sample[:20_000]]), trained, tmp_path)
    size = sum(path.stat().st_size for path in data.folder.iterdir())
    print(size, "bytes:", count_damages_found(data, 1), "damages found")


def test_tokens_with_a_flipped_bit_are_not_trained_on_but_made_again(trained, sample, tmp_path):
    corpus = corpus_of([sample])
    data = encode_corpus(corpus, trained, tmp_path)
    shard = data.folder / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    found = data.header
    asked = (found.content_hash, found.tokenizer_hash, found.split_fraction)
    assert find_tokens(tmp_path, *asked) is None
    assert encode_corpus(corpus, trained, tmp_path).folder == data.folder
    assert shard.read_bytes() == whole
    assert find_tokens(tmp_path, *asked) is not None
