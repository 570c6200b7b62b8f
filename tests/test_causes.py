"""The catalogue of causes against the code that builds them, the messages of each language, and the docs."""

import ast
import re
from pathlib import Path

import pytest

import clinometer
from clinometer import causes
from clinometer.causes import BY_NAME, CAUSES, UnknownCause, require
from clinometer.gradients.report.finding import Reason
from clinometer.messages import LANGUAGES, sentences
from clinometer.monitoring.alerts.alerts import Alerts

ROOT = Path(clinometer.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
DIAGNOSED = {"none", "zero", "partly-zero", "non-finite", "loop"}
CHECKS = ("check", "accumulation", "causality")
IN_CHECK = [cause for cause in CAUSES if cause.key.split(".")[0] in CHECKS]
ELSEWHERE = [cause for cause in CAUSES if cause not in IN_CHECK]


def nodes(*rooms, of=ast.Call):
    """(file, node) for every node of a kind in the files of these rooms."""
    for room in rooms:
        path = ROOT / room
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, of):
                    yield f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def words(*rooms):
    """Every string that stands in these rooms, whole and word by word."""
    found = {node.value for _, node in nodes(*rooms, of=ast.Constant) if isinstance(node.value, str)}
    return found | {word for text in found for word in text.split()}


def literal(call, place, name):
    """The constant an argument is written as; None for one that is computed, "" for one left out."""
    given = [k.value for k in call.keywords if k.arg == name] + call.args[place : place + 1]
    if not given:
        return ""
    return given[0].value if isinstance(given[0], ast.Constant) else None


def spoken(cause, variant, language="en"):
    """Whether what happened can be said of a variant: by its own sentence or its cause's."""
    owners = [f"{cause.key}.{variant}", cause.key]
    known = sentences(language)
    return any(f"{owner}.{part}" in known for owner in owners for part in ("what", "what_one", "what_none"))


# ---- the code ----


def test_every_reason_written_in_the_code_is_in_the_catalogue():
    checked = 0
    for _, call in nodes("gradients"):
        if getattr(call.func, "id", "") != "Reason":
            continue
        status, cause = literal(call, 0, "status"), literal(call, 1, "cause")
        if status and cause:
            checked += 1
            require(status, cause, literal(call, 3, "variant") or "")
    assert checked > 30


def test_every_clue_and_finding_about_the_loop_is_in_the_catalogue():
    known = {(c.name, v) for c in CAUSES for v in ("", *c.variants) if c.status in ("zero", "non-finite")}
    clues = loops = 0
    for place, call in nodes("gradients/diagnose"):
        name = getattr(call.func, "id", "")
        if name == "Clue" and (cause := literal(call, 0, "cause")):
            clues += 1
            assert (cause, literal(call, 1, "variant") or "") in known, place
        if name == "loop_finding":
            loops += 1
            require("loop", literal(call, 0, "cause"), literal(call, 9, "variant") or "")
    assert clues > 20
    assert loops > 10


@pytest.mark.parametrize(
    "cause",
    [c for c in CAUSES if c.status in DIAGNOSED and c in ELSEWHERE],
    ids=lambda c: f"{c.status}-{c.name}",
)
def test_every_line_of_the_catalogue_is_found_by_some_code(cause):
    written = words("gradients/diagnose", "gradients/trace", "gradients/optimizers")
    assert cause.name in written
    assert set(cause.variants) <= written


@pytest.mark.parametrize("cause", IN_CHECK, ids=lambda c: c.name)
def test_every_cause_of_a_check_is_found_by_some_code(cause):
    written = words("gradients/check")
    assert {cause.name, cause.name.replace("-", "_")} & written


def test_every_finding_of_a_check_is_in_the_catalogue():
    for _, call in nodes("gradients/check"):
        name = getattr(call.func, "id", "")
        if (
            name == "Finding"
            and (cause := literal(call, 0, "cause"))
            and (status := literal(call, 1, "status"))
        ):
            require(status, cause)
        if name == "_finding" and (cause := literal(call, 0, "cause")):
            require("explained", cause.replace("_", "-"))


def test_cuts_and_escapes_are_those_of_the_trace():
    from clinometer.gradients.trace import operations

    assert set(causes.ESCAPES.split()) == set(operations._ESCAPES.values())
    written = words("gradients/trace/operations.py")
    assert set(causes.CUTS.split()) <= written


def test_every_alert_is_in_the_catalogue_and_the_other_way_round():
    rules = {case.rule.cause for case in Alerts(lambda alert: None)._cases}
    assert rules == {cause.name for cause in CAUSES if cause.status == "alert"}


def test_an_unknown_cause_raises():
    with pytest.raises(UnknownCause, match="'cutt'"):
        Reason("none", "cutt")
    with pytest.raises(UnknownCause, match="'none'"):
        Reason("none", "masked")
    with pytest.raises(UnknownCause, match="'detached'"):
        Reason("none", "cut", "fault", "detached")
    with pytest.raises(UnknownCause, match="only as"):
        Reason("none", "frozen", "fault")


def test_no_line_stands_twice():
    assert len(BY_NAME) == len(CAUSES)
    assert all(len(set(cause.variants)) == len(cause.variants) for cause in CAUSES)


# ---- the messages ----


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_cause_and_variant_has_its_sentences(language):
    silent = [
        (cause.status, cause.name, variant)
        for cause in CAUSES
        for variant in (cause.variants or ("",))
        if not spoken(cause, variant, language)
    ]
    assert silent == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_belongs_to_no_cause(language):
    orphans = []
    for key in sentences(language):
        first, *rest = key.split(".")
        if first == "diagnosis" and len(rest) > 2:
            status, name, *variant = rest[:-1]
        elif first == "alert":
            status, (name, *variant) = "alert", rest[:-1]
        else:
            continue
        cause = BY_NAME.get((status, name))
        if cause is None or not set(variant) <= set(cause.variants):
            orphans.append(key)
    assert orphans == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_about_a_finding_of_a_check_belongs_to_no_cause(language):
    spoken_for = {
        cause.key if cause.key.count(".") else f"{cause.key}.{v}"
        for cause in IN_CHECK
        for v in cause.variants
    }
    said = {key.rsplit(".", 1)[0] for key in sentences(language) if key.endswith((".what", ".what_one"))}
    said = {".".join(key.split(".")[:2]) for key in said if key.split(".")[0] in CHECKS}
    assert said == spoken_for


# ---- the docs ----


def documented(language):
    """Section → {cause: the first word of its text} of the page of causes."""
    text = (DOCS / language / "causes.md").read_text(encoding="utf-8")
    found = {}
    for section in re.finditer(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        entries = re.finditer(r"^### (\S+)\n\n```python\n.*?```\n\n(\S+)", section[2], re.M | re.S)
        found[section[1]] = {entry[1]: entry[2] for entry in entries}
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_cause_of_a_diagnosis_has_its_section_and_no_section_is_left_over(language):
    sections = {(status, name) for status, names in documented(language).items() for name in names}
    sections = {(status, name) for status, name in sections if status != "steps"}
    known = {(c.status.replace("partly-", ""), c.name) for c in ELSEWHERE if c.status in DIAGNOSED}
    assert sections == {(status, name) for status, name in known if name != "unknown"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_alert_is_on_the_page(language):
    alerts = {cause.name for cause in CAUSES if cause.status == "alert"}
    steps = set(documented(language)["steps"])
    text = (DOCS / language / "causes.md").read_text(encoding="utf-8")
    assert steps <= alerts
    assert all(f"`{name}`" in text.partition("## steps")[2] for name in alerts - steps)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_section_begins_with_a_severity_that_the_cause_can_have(language):
    said = {"Fault": "fault", "Explained": "explained", "Warning": "warning"}
    said |= {"错误": "fault", "解释": "explained", "警告": "warning"}
    for section, names in documented(language).items():
        for name, word in names.items():
            status = "alert" if section == "steps" else section
            start = next((severity for start, severity in said.items() if word.startswith(start)), word)
            assert start in BY_NAME[status, name].severities, (section, name, word)
