from clinometer.text.corpus import END_OF_TEXT, open_corpus
from clinometer.text.tokenizer import train_bpe
from clinometer.training.run import run_tokens
from clinometer.training.settings.config import DataConfig, RunConfig


class Seen:
    """Keeps what a bar was told."""

    def __init__(self):
        self.told = []

    def notice(self, key, /, **values): ...

    def progress(self, key, done, total):
        self.told.append((done, total))


def test_one_long_document_is_never_whole_in_memory(tmp_path):
    file = tmp_path / "long.txt"
    text = "a line of some length, and a number: 12\n" * 200_000
    file.write_text(text)
    config = RunConfig(data=DataConfig(corpus=str(file)))
    seen = Seen()
    pieces = list(run_tokens._training_text(config, open_corpus(file), seen))
    assert seen.told[-1] == (len(text), len(text)), "the bar fills"
    assert seen.told == sorted(seen.told)
    cut = int(len(text) * (1 - config.data.validation_fraction))
    assert "".join(pieces) == text[:cut]
    assert max(map(len, pieces)) < 1.1 * (1 << 20), "reading goes by blocks of 2^20 bytes"


def test_the_tokenizer_is_trained_on_a_limited_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(run_tokens, "TOKENIZER_CHARACTERS", 1000)
    file = tmp_path / "long.txt"
    file.write_text(f"one{END_OF_TEXT}" * 50 + "two " * 1000)
    config = RunConfig(data=DataConfig(corpus=str(file)))
    assert sum(map(len, run_tokens._training_text(config, open_corpus(file), Seen()))) <= 1000


def test_pieces_give_the_tokenizer_of_the_whole_document(tmp_path):
    file = tmp_path / "long.txt"
    text = "".join(f"word{i % 977} of line {i}, naïve 坡度\n" for i in range(120_000))
    file.write_text(text, encoding="utf-8")
    config = RunConfig(data=DataConfig(corpus=str(file)))
    cut = int(len(text) * (1 - config.data.validation_fraction))
    pieces = run_tokens._training_text(config, open_corpus(file), Seen())
    assert train_bpe(pieces, 600, progress=False).hash == train_bpe([text[:cut]], 600, progress=False).hash
