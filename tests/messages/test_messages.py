import re
import string
from pathlib import Path

import pytest

import clinometer
from clinometer.messages import InputError, current_language, say, sentences, set_language


def places(sentence):
    return sorted({name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None})


def test_both_languages_have_the_same_sentences():
    assert set(sentences("en")) == set(sentences("zh"))
    assert len(sentences("en")) >= 10


@pytest.mark.parametrize("key", sorted(sentences("en")))
def test_a_sentence_has_the_same_places_in_both_languages(key):
    assert places(sentences("en")[key]) == places(sentences("zh")[key])
    assert sentences("en")[key].strip()


@pytest.mark.parametrize("key", sorted(sentences("zh")))
def test_the_chinese_sentence_is_chinese(key):
    text = re.sub(r"\{[^}]*\}", "", sentences("zh")[key])
    if re.search(r"[A-Za-z]{4,} [a-z]{3,} [a-z]{3,}", sentences("en")[key]):  # a sentence, not a bare value
        assert re.search(r"[一-鿿]", text)


def test_an_error_is_rendered_in_the_language_of_whoever_reads_it():
    error = InputError("model.positive", field="d_model", value=-3)
    assert str(error) == "d_model = -3 must be a whole number above zero."
    assert error.render("zh") == "d_model = -3 必须是大于零的整数。"


def test_the_language_comes_from_the_environment_and_can_be_fixed(monkeypatch):
    monkeypatch.setenv("CLINOMETER_LANG", "zh_CN.UTF-8")
    assert current_language() == "zh"
    monkeypatch.delenv("CLINOMETER_LANG")
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(variable, raising=False)
    assert current_language() == "en"
    monkeypatch.setenv("LANG", "zh_TW")
    assert current_language() == "zh"
    set_language("en")
    try:
        assert say("model.positive", field="x", value=1).endswith("above zero.")
    finally:
        set_language(None)
    with pytest.raises(InputError):
        set_language("fr")


def test_every_plain_sentence_is_said_somewhere():
    """Those whose key is put together while running (causes, settings, the doctor's rows) are left out."""
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(clinometer.__file__).parent.rglob("*.py")
    )
    rooms = (
        "model",
        "train",
        "training",
        "run",
        "resume",
        "checkpoint",
        "instrument",
        "explain",
        "demo",
        "generate",
        "export",
        "record",
    )
    keys = [key for key in sentences("en") if key.count(".") == 1 and key.split(".")[0] in rooms]
    assert len(keys) > 60
    assert [key for key in keys if f'"{key}"' not in source] == []


def test_every_sentence_of_the_page_is_said_there_and_none_is_missing():
    """The page's modules name their keys in full, so that a text search finds them."""
    static = Path(clinometer.__file__).parent / "view" / "static"
    modules = "\n".join(path.read_text(encoding="utf-8") for path in static.glob("*.js"))
    said = set(re.findall(r'"(page\.[a-z0-9_]+)"', modules))
    known = {key for key in sentences("en") if key.startswith("page.")}
    assert len(known) > 150
    assert sorted(known - said) == []
    assert sorted(said - known) == []
