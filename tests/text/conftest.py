import pytest

from clinometer.text.corpus import END_OF_TEXT, open_corpus
from clinometer.text.tokenizer import train_bpe


@pytest.fixture(scope="session")
def sample():
    """About 300 KB of real text that every machine has."""
    documents = list(open_corpus("python").documents())
    return "".join(documents[::40] + documents[20::40])[:300_000]  # a later Python has less of it


@pytest.fixture(scope="session")
def trained(sample):
    return train_bpe([sample], 1000, special_tokens=(END_OF_TEXT, "<|end|>", "<|end|><|end|>"))
