import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from clinometer.messages import InputError
from clinometer.text.corpus import END_OF_TEXT, open_corpus
from clinometer.text.tokenizer import Tokenizer, byte_tokenizer, from_gpt2_files, train_bpe

MORE = ("e\u0301", "7", "<|", "|>")
SPECIAL = [END_OF_TEXT, "<|end|>", "<|end|><|end|>"]
texts = st.text() | st.lists(
    st.sampled_from([*SPECIAL, " ", "\n", "\r", "\0", "'s", "the", "坡度", "🧗🏽‍♀️", "é", *MORE])
).map("".join)


def refused(call, *arguments, **settings):
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    for language in ("en", "zh"):
        assert caught.value.render(language)
    return caught.value


@settings(deadline=None)
@given(texts)
def test_decoding_gives_back_every_text(trained, text):
    for tokenizer in (trained, byte_tokenizer()):
        for allow_special in (True, False):
            assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special)) == text


@settings(deadline=None)
@given(texts)
def test_the_stream_decoder_gives_the_same_text_and_never_half_a_character(trained, text):
    stream = trained.decode_stream()
    parts = [stream.push(token_id) for token_id in trained.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


def test_the_stream_decoder_says_when_a_character_was_never_completed():
    tokenizer = byte_tokenizer()
    stream = tokenizer.decode_stream()
    assert [stream.push(byte) for byte in "坡".encode()[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert tokenizer.decode("坡".encode()[:2]) == "\ufffd"


@settings(deadline=None)
@given(st.lists(texts, max_size=8))
def test_streamed_ids_are_the_ids_of_the_joined_text(trained, parts):
    assert list(trained.encode_iterable(parts)) == trained.encode("".join(parts))


def test_special_tokens_are_whole_and_the_longest_wins(trained):
    end, one, two = (trained.encode(token) for token in SPECIAL)
    assert [len(end), len(one), len(two)] == [1, 1, 1]
    assert end == [trained.end_of_text_id] == [0]
    assert trained.encode("<|end|>" * 3) == two + one
    assert trained.encode("<|end|><|endoftext|>") == one + end


def test_special_tokens_can_be_plain_text(trained):
    ids = trained.encode("a<|endoftext|>b", allow_special=False)
    assert 0 not in ids
    assert trained.decode(ids) == "a<|endoftext|>b"


def test_every_id_has_its_bytes_and_the_ids_are_specials_then_bytes_then_merges(trained):
    assert trained.vocab_size == 1000
    assert [trained.token_bytes(i).decode() for i in range(3)] == SPECIAL
    assert sorted(trained.token_bytes(i) for i in range(3, 259)) == [bytes([b]) for b in range(256)]
    assert all(len(trained.token_bytes(i)) > 1 for i in range(259, 1000))
    for bad in (-1, 1000):
        assert refused(trained.token_bytes, bad).key == "text.id_range"
        assert refused(trained.decode, [5, bad]).values["value"] == bad


def test_byte_tokenizer_ids_are_the_bytes():
    tokenizer = byte_tokenizer()
    text = "a坡\0\r\n "
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.end_of_text_id] == [256]
    assert tokenizer.vocab_size == 257
    assert tokenizer.decode(range(128)) == bytes(range(128)).decode()


def test_lone_surrogates_are_refused_with_their_place(trained):
    assert refused(trained.encode, "ab\ud83d").values["index"] == 2
    assert refused(train_bpe, ["a\ud83d"], 300).key == "text.surrogate"


def test_training_equals_the_library_on_the_whole_text(sample):
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([sample], trainer)
    ours = json.loads(train_bpe([sample], 1200)._library.to_str())
    assert ours["model"] == json.loads(library.to_str())["model"]


def test_training_twice_in_two_processes_gives_the_same_bytes(tmp_path):
    program = (
        "import sys\nfrom clinometer.text.corpus import open_corpus\n"
        "from clinometer.text.tokenizer import train_bpe\n"
        "text = ''.join(list(open_corpus('python').documents())[::60])[:200_000]\n"
        "train_bpe([text], 700).save(sys.argv[1])"
    )
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        subprocess.run([sys.executable, "-c", program, folder], check=True, env=environment)
        written.append((folder / "tokenizer.json").read_bytes())
    assert written[0] == written[1]


def test_special_tokens_in_the_training_text_are_not_learned():
    tokenizer = train_bpe([f"aXbY{END_OF_TEXT}" * 50], 260)
    learned = b"".join(tokenizer.token_bytes(i) for i in range(257, tokenizer.vocab_size))
    assert b"|" not in learned
    assert b"end" not in learned


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    assert refused(train_bpe, ["text"], 256).values["smallest"] == 257
    assert train_bpe(["text"], 257).vocab_size == 257


def test_a_vocabulary_larger_than_the_text_can_give_says_how_many_it_can():
    error = refused(train_bpe, ["aaaa bbbb aaaa bbbb"], 10_000)
    assert error.key == "text.vocab_large"
    assert train_bpe(["aaaa bbbb aaaa bbbb"], error.values["largest"]).vocab_size == error.values["largest"]


def test_words_without_end_do_not_stop_the_training():
    assert train_bpe(["ab" * 400_000], 262).vocab_size == 262


def test_a_saved_tokenizer_loads_with_the_same_ids_and_hash(trained, sample, tmp_path):
    trained.save(tmp_path / "deep" / "er")
    for path in (tmp_path / "deep" / "er", tmp_path / "deep" / "er" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode(sample) == trained.encode(sample)
        assert loaded.hash == trained.hash
    assert trained.hash != byte_tokenizer().hash
    assert sorted(file.name for file in (tmp_path / "deep" / "er").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_transformers_opens_the_folder_with_the_same_ids(trained, sample, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained if kind == "trained" else byte_tokenizer()
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = sample[:20_000] + "坡度 <|end|><|end|><|end|> \r\n\n  x , . 's" + END_OF_TEXT
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.end_of_text_id
    assert len(theirs) == tokenizer.vocab_size


def test_gpt2_files_give_the_same_tokenizer(trained, sample, tmp_path):
    model = json.loads(trained.to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    tokenizer = from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert tokenizer.encode(sample + END_OF_TEXT) == trained.encode(sample + END_OF_TEXT)
    (tmp_path / "merges.txt").write_text("one two three\n")
    error = refused(from_gpt2_files, tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert error.key == "text.tokenizer_foreign"
    (tmp_path / "vocab.json").write_text("[1, 2]")
    error = refused(from_gpt2_files, tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert error.key == "text.tokenizer_broken"


def test_files_that_are_no_tokenizer_are_refused_each_with_its_reason(trained, tmp_path):
    file = tmp_path / "tokenizer.json"
    assert refused(Tokenizer.load, file).key == "text.tokenizer_missing"
    assert refused(Tokenizer.load, tmp_path).key == "text.tokenizer_missing"
    whole = trained.to_json()
    for content, key in [
        ("", "text.tokenizer_broken"),
        (whole[: len(whole) // 2], "text.tokenizer_broken"),
        ('{"a": 1}', "text.tokenizer_foreign"),
        ("[]", "text.tokenizer_foreign"),
    ]:
        file.write_text(content, encoding="utf-8")
        assert refused(Tokenizer.load, file).key == key
    file.write_bytes(b"\xff\xfe\0")
    assert refused(Tokenizer.load, file).key == "text.tokenizer_broken"


def test_tokenizers_that_lose_text_are_refused(trained, tmp_path):
    def changed(**parts):
        library = tokenizers.Tokenizer.from_str(trained.to_json())
        for name, part in parts.items():
            setattr(library, name, part)
        library.save(str(tmp_path / "tokenizer.json"))
        return refused(Tokenizer.load, tmp_path)

    assert changed(normalizer=normalizers.NFC()).key == "text.tokenizer_kind"
    assert changed(pre_tokenizer=pre_tokenizers.Whitespace()).key == "text.tokenizer_kind"
    assert changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)).key == "text.tokenizer_kind"
    assert changed(model=models.BPE(vocab={"a": 0}, merges=[])).values["reason"] == "255 / 256 bytes missing"


def test_a_folder_that_cannot_be_written_is_refused(trained, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(trained.save, tmp_path / "file").key == "text.cannot_write"


def test_importing_the_room_imports_no_heavy_library():
    program = (
        "import sys, clinometer.text.corpus, clinometer.text.tokenizer, clinometer.text.encoding\n"
        "print(sorted({'torch', 'tokenizers', 'tiktoken', 'rich', 'datasets'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert shown.stdout == "[]\n"


def test_pieces_of_a_corpus_train_the_tokenizer_of_the_whole_text(tmp_path, sample):
    text = sample * 4
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert len(text) > 1 << 20
    assert train_bpe(open_corpus(tmp_path / "a.txt").texts(), 600).hash == train_bpe([text], 600).hash


def test_a_tokenizer_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", forbidden)
    monkeypatch.setattr(Path, "read_text", forbidden)
    assert "Permission denied" in refused(Tokenizer.load, tmp_path / "x").values["reason"]
