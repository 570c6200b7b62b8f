import dataclasses
import enum
import io
import json
import math
import pathlib

import numpy
import pytest
import torch
from rich.console import Console

from clinometer import messages
from clinometer.gradients.report.document import Line, fault, name, sentence
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding
from clinometer.gradients.report.places import Where
from clinometer.gradients.report.result import Result, jsonable
from clinometer.gradients.sandbox.subject import UnknownName
from clinometer.messages import InputError


class Norms(Result):
    def __init__(self, norms):
        self.norms = norms

    def entries(self):
        return self.norms

    def other_names(self):
        return {"head.weight": "embed.weight"}

    def document(self, language=None):
        return [Line((fault("✗ "), *sentence("gradients.finding.names", language, names=name("<w>"))))]

    def facts(self):
        return {"norms": self.norms}


RESULT = Norms({"embed.weight": 1.5, "bias": math.nan})


def test_an_entry_is_found_by_any_of_its_names():
    assert RESULT["embed.weight"] == RESULT["head.weight"] == 1.5
    assert "head.weight" in RESULT
    assert "bais" not in RESULT
    assert list(RESULT) == ["embed.weight", "bias"]
    assert len(RESULT) == 2
    assert Norms({})
    with pytest.raises(UnknownName, match="nearest name is 'bias'"):
        RESULT["bais"]
    with pytest.raises(KeyError):
        RESULT[0]


def test_one_document_gives_text_console_and_html():
    assert RESULT.render("en") == str(RESULT) == "✗ concerns: <w>"
    assert RESULT.render("zh") == "✗ 涉及：<w>"
    assert "涉及" not in RESULT._repr_html_()
    assert "&lt;w&gt;" in RESULT._repr_html_()
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="standard").print(RESULT)
    assert "\x1b[1;31m✗" in stream.getvalue()
    with pytest.raises(InputError):
        RESULT.render("fr")


def test_the_text_fits_the_terminal(monkeypatch):
    class Long(Norms):
        def document(self, language=None):
            return [Line("word " * 60)]

    for columns, widest in ((80, 80), (400, 120), (10, 60)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(Long({})).splitlines()
        assert widest - 5 < max(map(len, lines)) <= widest
    assert max(map(len, Long({}).render(width=30).splitlines())) <= 30


def test_to_dict_leaks_no_nan():
    data = RESULT.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == {"norms": {"embed.weight": 1.5, "bias": "NaN"}}


def test_jsonable_takes_whatever_a_result_holds():
    class Kind(enum.Enum):
        A = "a"

    @dataclasses.dataclass
    class Pair:
        x: float
        y: tuple

    given = {
        1: Kind.A,
        "pair": Pair(-math.inf, (1, True, None)),
        "tensor": torch.tensor([1.0, math.inf]),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "bf16": torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True),
        "complex": 1 + 2j,
        "dtype": torch.bfloat16,
        "path": pathlib.PurePosixPath("a/b"),
        "numpy": numpy.float32(0.5),
        "array": numpy.array([1, 2]),
        "nan64": numpy.float64("nan"),
        "shape": torch.Size([2, 3]),
        "set": {7},
        "where": Where("a.py", 1),
        "other": torch.device("cpu"),
    }
    data = jsonable(given)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["1"] == "a"
    assert data["pair"] == {"x": "-Infinity", "y": [1, True, None]}
    assert data["tensor"] == [1.0, "Infinity"]
    assert (data["scalar"], data["bf16"], data["numpy"], data["nan64"]) == (2, 1.5, 0.5, "NaN")
    assert data["complex"] == {"real": 1.0, "imag": 2.0}
    assert (data["dtype"], data["path"], data["other"]) == ("bfloat16", "a/b", "cpu")
    assert (data["array"], data["shape"], data["set"]) == ([1, 2], [2, 3], [7])
    assert data["where"]["line"] == 1


@pytest.fixture
def cut_sentences(monkeypatch):
    english = {
        "test.cut.what": "{count} parameters have no gradient",
        "test.cut.what_one": "{name} has no gradient",
        "test.cut.why": "{op}() forgets where it came from.",
        "test.cut.remedy": "Remove it.",
        "test.rows.what": "{count} rows are zero",
    }
    real = messages.sentences
    from clinometer.gradients.report import document, finding

    for module in (messages, document, finding):
        monkeypatch.setattr(module, "sentences", lambda language: {**real(language), **english})
    below = messages._below
    monkeypatch.setattr(messages, "_below", lambda lang, top: english if top == "test" else below(lang, top))


def test_a_finding_is_shown_as_the_voice_asks(cut_sentences):
    here = Where(__file__, 1, "Encoder.forward", "detach")
    names = tuple(f"w{i}" for i in range(27))
    finding = Finding("cut", "none", FAULT, "test.cut", names, here, {"op": "detach"})

    class Shown(Norms):
        def document(self, language=None):
            return finding.document(language)

    assert Shown({}).render("en").splitlines() == [
        "✗ 27 parameters have no gradient",
        "    test_report.py:1   import dataclasses   in Encoder.forward",
        "    detach() forgets where it came from.",
        "    concerns: w0, w1, w2 and 24 more",
        "    Remove it.",
    ]
    assert "位于 Encoder.forward" in Shown({}).render("zh")
    assert finding.say("what") == "27 parameters have no gradient"
    data = json.loads(json.dumps(jsonable(finding), allow_nan=False))
    assert data["names"][26] == "w26"
    assert (data["message"], data["where"]["source"]) == (
        "27 parameters have no gradient",
        "import dataclasses",
    )


def test_a_finding_about_one_tensor_names_it_and_needs_no_list(cut_sentences):
    finding = Finding("cut", "none", FAULT, "test.cut", ("w",), values={"op": "detach"})
    text = ["".join(span.text for span in line.spans) for line in finding.document("en")]
    assert text == ["✗ w has no gradient", "detach() forgets where it came from.", "Remove it."]


def test_what_is_explained_is_marked_as_a_note_and_may_have_no_remedy(cut_sentences):
    finding = Finding("absent-rows", "partly-zero", EXPLAINED, "test.rows", ("w",), values={"count": 9876})
    (line,) = finding.document("en")
    assert "".join(span.text for span in line.spans) == "· 9876 rows are zero"
    assert finding.say("remedy") == ""
