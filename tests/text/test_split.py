import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinometer.messages import InputError
from clinometer.text.corpus import END_OF_TEXT, corpus_of, open_corpus
from clinometer.text.validation_split import split

DOCUMENTS = [f"document number {number}" for number in range(1000)]


def documents_of(chosen, corpus):
    """Each document, or part of one at a tail cut, whole in memory."""
    gathered = []
    current = "train"
    for side, text, ends in chosen.parts(corpus):
        if gathered and side != current:
            yield current, "".join(gathered)
            gathered = []
        current = side
        gathered.append(text)
        if ends:
            yield side, "".join(gathered)
            gathered = []


def sides(corpus, fraction=0.1):
    chosen = split(corpus, fraction)
    pairs = list(documents_of(chosen, corpus))
    train = [text for side, text in pairs if side == "train"]
    return chosen, train, [text for side, text in pairs if side == "validation"]


def test_a_document_is_held_out_by_its_own_hash_whatever_the_order():
    chosen, train, validation = sides(corpus_of(DOCUMENTS))
    assert chosen.rule == "hash"
    assert sorted(train + validation) == sorted(DOCUMENTS)
    _, _, reverse = sides(corpus_of(DOCUMENTS[::-1]))
    assert reverse[::-1] == validation
    _, _, fewer = sides(corpus_of(DOCUMENTS[:500]))
    assert fewer == [text for text in validation if text in DOCUMENTS[:500]]


def test_the_split_is_the_same_on_every_machine():
    chosen, _, validation = sides(corpus_of(DOCUMENTS))
    assert len(validation) == 96, "96 of these 1000 fall below 0.1"
    assert chosen.content_hash.startswith("bb4a71743f50fd74")


def test_a_larger_fraction_only_adds_documents():
    _, _, tenth = sides(corpus_of(DOCUMENTS), 0.1)
    _, _, third = sides(corpus_of(DOCUMENTS), 0.3)
    assert set(tenth) < set(third)
    assert 250 < len(third) < 350


@given(st.text(min_size=2, max_size=200), st.sampled_from([0.1, 0.25, 0.5]))
def test_one_document_is_split_as_nanogpt_does(text, fraction):
    chosen, train, validation = sides(corpus_of([text]), fraction)
    if END_OF_TEXT in text:
        return
    cut = int(len(text) * (1 - fraction))
    assert chosen.rule == "tail"
    assert ("".join(train), "".join(validation)) == (text[:cut], text[cut:])


@given(st.lists(st.text("ab\n", min_size=1), min_size=1, max_size=19))
def test_few_documents_are_cut_at_the_tail_of_the_whole_text(documents):
    corpus = corpus_of(documents)
    chosen, train, validation = sides(corpus)
    whole = "".join(documents)
    assert chosen.rule == "tail"
    assert ("".join(train), "".join(validation)) == (whole[: chosen.cut], whole[chosen.cut :])
    ended = sum(ends for _, _, ends in chosen.parts(corpus))
    assert ended == len(documents), "a document cut in two ends once"


def test_a_cut_document_does_not_end_on_the_training_side():
    corpus = corpus_of(["aaaa", "bbbb", "cccc"])
    assert list(split(corpus, 0.5).parts(corpus)) == [
        ("train", "aaaa", True),
        ("train", "bb", False),
        ("validation", "bb", True),
        ("validation", "cccc", True),
    ]


def test_a_streamed_file_is_split_like_the_whole_text(tmp_path):
    text = "".join(f"line {number}\n" for number in range(300_000))
    (tmp_path / "a.txt").write_text(text)
    corpus = open_corpus(tmp_path / "a.txt")
    chosen = split(corpus)
    found = {"train": "", "validation": ""}
    for side, part, _ in chosen.parts(corpus):
        found[side] += part
    cut = int(len(text) * 0.9)
    assert len(text) > 3 << 20
    assert found == {"train": text[:cut], "validation": text[cut:]}


def test_twenty_documents_with_an_empty_side_fall_back_to_the_tail():
    chosen, train, validation = sides(corpus_of(["same"] * 30))
    assert chosen.rule == "tail"
    assert train
    assert validation


def test_the_content_hash_knows_where_documents_end():
    assert split(corpus_of(["ab", "c"])).content_hash != split(corpus_of(["a", "bc"])).content_hash


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(InputError) as caught:
        split(corpus_of(["text"]), fraction)
    assert caught.value.key == "text.fraction"


def test_an_empty_corpus_is_refused():
    with pytest.raises(InputError) as caught:
        split(corpus_of([]))
    assert caught.value.key == "text.empty"
