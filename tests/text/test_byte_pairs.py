"""A tokenizer and its two tables are the same thing."""

import pytest

from clinometer.messages import InputError
from clinometer.text.byte_pairs import byte_pairs, from_byte_pairs
from clinometer.text.tokenizer import byte_tokenizer, train_bpe

TEXT = "the slope of the loss, 损失的斜率 the slope\n" * 3


@pytest.mark.parametrize("special", [("<|endoftext|>",), ("<|a b|>", "<|é|>"), ()])
def test_a_trained_tokenizer_comes_back_from_its_tables(special):
    tokenizer = train_bpe([TEXT], 280, special_tokens=special)
    vocab, merges = byte_pairs(tokenizer)
    assert len(vocab) == 280
    assert len(merges) == 280 - 256 - len(special)
    again = from_byte_pairs(vocab, merges, special)
    text = TEXT + "".join(special) + " slope"
    assert again.encode(text) == tokenizer.encode(text)
    assert byte_pairs(again) == (vocab, merges)
    assert again.special_tokens == tokenizer.special_tokens == special


def test_tables_of_bytes_alone():
    vocab, merges = byte_pairs(byte_tokenizer())
    assert merges == []
    assert vocab == {**{i: bytes([i]) for i in range(256)}, 256: b"<|endoftext|>"}


def test_tables_that_make_no_tokenizer():
    vocab, merges = byte_pairs(byte_tokenizer())
    with pytest.raises(InputError, match=r"b'a': 97, 300"):
        from_byte_pairs(vocab | {300: b"a"}, merges)
    with pytest.raises(InputError, match="1 / 256"):
        from_byte_pairs({i: token for i, token in vocab.items() if i != 97}, merges)
    with pytest.raises(InputError, match="merges"):
        from_byte_pairs(vocab, [(b"a", b"b")])
