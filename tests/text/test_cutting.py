import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinometer.text.corpus import END_OF_TEXT
from clinometer.text.safe_cuts import last_safe_cut, safe_pieces
from clinometer.text.tokenizer import train_bpe

MORE = ("e\u0301", "7", "<|", "|>")
SPECIAL = (END_OF_TEXT, "<|end|>", "<|end|><|end|>", "<| a b |>")
SIGNS = [
    *SPECIAL,
    *" \n\r\t\v\x1c\x85\xa0\u2028\u3000",
    *"aZ7'.,!é坡度，。",
    "'s",
    "'re",
    "🧗🏽‍♀️",
    "e\u0301",
    "<|",
    "|>",
]
texts = st.lists(st.sampled_from(SIGNS), max_size=60).map("".join) | st.text(max_size=60)


@pytest.fixture(scope="module")
def eager():
    """A tokenizer that has merged whatever may stand together, so that a wrong cut changes ids."""
    generator = random.Random(0)
    text = "".join(generator.choices(SIGNS, k=100_000))
    return train_bpe([text], 3000, special_tokens=SPECIAL)


@settings(deadline=None, max_examples=300)
@given(texts)
def test_ids_of_the_two_sides_of_a_cut_are_the_ids_of_the_whole(eager, text):
    whole = eager.encode(text)
    cuts = {last_safe_cut(text, eager.special_tokens, end) for end in range(len(text) + 1)}
    for cut in cuts:
        assert eager.encode(text[:cut]) + eager.encode(text[cut:]) == whole


@settings(deadline=None, max_examples=500)
@given(texts, st.integers(1, 12), st.integers(1, 12))
def test_ids_of_pieces_are_the_ids_of_the_whole(eager, text, arriving, characters):
    chunks = [text[start : start + arriving] for start in range(0, len(text), arriving)]
    pieces = list(safe_pieces(chunks, eager.special_tokens, characters=characters))
    assert "".join(pieces) == text
    assert "" not in pieces
    assert [token_id for piece in pieces for token_id in eager.encode(piece)] == eager.encode(text)


def test_real_text_is_cut_into_pieces_of_the_size_wanted(sample, trained):
    pieces = list(safe_pieces([sample], characters=5000))
    assert max(map(len, pieces)) <= 5000
    assert len(pieces) < 1.1 * len(sample) / 5000
    assert [i for piece in pieces for i in trained.encode(piece)] == trained.encode(sample)


@pytest.mark.parametrize("special", [(), ("<| a b |>",)])
def test_a_cut_is_never_inside_a_special_token(special):
    text = "x<| a b |>"
    cuts = {last_safe_cut(text, special, end) for end in range(len(text) + 1)}
    assert cuts == ({0} if special else {0, 3, 5, 7})


def test_text_without_a_safe_place_stays_whole():
    text = "x" * 100_000
    assert last_safe_cut(text) == 0
    assert list(safe_pieces([text[i : i + 100] for i in range(0, len(text), 100)], characters=1000)) == [text]


def test_the_search_looks_further_back_until_it_finds_a_place():
    text = "word and" + "x" * 50_000
    assert last_safe_cut(text) == 4
