import re
import string
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import clinometer
from clinometer.gradients.report.document import Span, sentence
from clinometer.messages import InputError, current_language, say, sentences, set_language


def places(sentence):
    """The values that a sentence shows, and those that choose a word of it (`count|it|them`)."""
    names = {name for _, name, _, _ in string.Formatter().parse(sentence) if name}
    chosen = {name.partition("|")[0] for name in names if "|" in name}
    return {name for name in names if "|" not in name}, chosen


def test_both_languages_have_the_same_sentences():
    assert set(sentences("en")) == set(sentences("zh"))
    assert len(sentences("en")) >= 10


@pytest.mark.parametrize("language", ["en", "zh"])
def test_tables_read_one_by_one_say_what_the_whole_file_says(language):
    whole = tomllib.loads(
        files("clinometer.messages").joinpath(f"{language}.toml").read_text(encoding="utf-8")
    )

    def value(table, key):
        return table if not key else value(table[key[0]], key[1:])

    said = sentences(language)
    assert all(value(whole, key.split(".")) == text for key, text in said.items())
    assert len(said) == sum(1 for _ in leaves(whole))


def leaves(table):
    for value in table.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("key", sorted(sentences("en")))
def test_a_sentence_has_the_same_places_in_both_languages(key):
    (shown, chosen), (shown_there, chosen_there) = (places(sentences(code)[key]) for code in ("en", "zh"))
    assert shown ^ shown_there <= chosen | chosen_there  # a plural is chosen in one language only
    assert sentences("en")[key].strip()


@pytest.mark.parametrize("key", sorted(sentences("zh")))
def test_the_chinese_sentence_is_chinese(key):
    text = re.sub(r"\{[^}]*\}", "", sentences("zh")[key])
    if re.search(r"[A-Za-z]{4,} [a-z]{3,} [a-z]{3,}", sentences("en")[key]):  # a sentence, not a bare value
        assert re.search(r"[一-鿿]", text)


@pytest.mark.parametrize("given", [1, "1"])
def test_one_is_spoken_of_in_the_singular(given):
    assert say("diagnosis.more", "en", count=given) == "1 more finding is in diagnosis.findings."
    spans = sentence("diagnosis.more", "en", count=Span("1", "number"))
    assert "".join(span.text for span in spans) == "1 more finding is in diagnosis.findings."


@pytest.mark.parametrize("given", [0, 2, 11, "1,001"])
def test_any_other_number_is_spoken_of_in_the_plural(given):
    assert "more findings are in" in say("diagnosis.more", "en", count=given)


COUNTED = (
    "alerts|bytes|calls|classes|days|decades|documents|evaluations|files|findings|frames|gradients|"
    "layers|lines|means|nodes|numbers|pairs|parameters|parts|positions|rows|sentences|steps|tensors|tokens|"
    "units|values|weights"
)


@pytest.mark.parametrize("key", sorted(sentences("en")))
def test_a_counted_noun_knows_its_singular(key):
    """Where a number may be 1; a `what` that has its own `what_one` is said of several only."""
    if f"{key}_one" in sentences("en"):
        return
    found = re.findall(rf"\{{\w+(?::,)?\}} (?:[a-z]+ )?(?:{COUNTED})\b(?!/)", sentences("en")[key])
    found = [text for text in found if not re.search(r"\} (of|for|in|uses) ", text)]
    assert not found
    assert not re.search(r"(?<!of )\ball \{", sentences("en")[key])  # "all 1 tensor"


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
    modules = "\n".join(path.read_text(encoding="utf-8") for path in static.rglob("*.js"))
    said = set(re.findall(r'"(page\.[a-z0-9_]+)"', modules))
    known = {key for key in sentences("en") if key.startswith("page.")}
    assert len(known) > 150
    assert sorted(known - said) == []
    assert sorted(said - known) == []
