"""The page of causes, last section: each block of code runs, and the alert is the one it stands under."""

import re
from pathlib import Path

import pytest
import torch

from clinometer.monitoring.alerts.rules import RULES, thresholds_of

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = re.compile(r"^### (\S+)\n\n```python\n(.*?)```\n\n(\S+)", re.M | re.S)
SEVERITY = {"Fault.": "fault", "Warning.": "warning", "错误": "fault", "警告": "warning"}


def section(language):
    text = (DOCS / language / "causes.md").read_text(encoding="utf-8")
    return text, text[text.index("\n## steps\n") :]


ENTRIES = [(lang, *m.groups()) for lang in ("en", "zh") for m in ENTRY.finditer(section(lang)[1])]


@pytest.mark.parametrize(
    ("language", "cause", "code", "word"), ENTRIES, ids=[f"{e[0]}-{e[1]}" for e in ENTRIES]
)
def test_the_smallest_code_that_shows_a_cause_shows_it(language, cause, code, word):
    torch.manual_seed(0)
    assert len(code.splitlines()) <= 12
    text, steps = section(language)
    names = {}
    for page in (text, steps):
        exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)
    *body, last = code.splitlines()
    exec("\n".join(body), names)
    alerts = eval(last, names)
    assert [alert["cause"] for alert in alerts] == [cause]
    assert alerts[0]["severity"] == next(v for k, v in SEVERITY.items() if word.startswith(k))


def test_every_cause_that_watch_reports_is_on_the_page():
    for language in ("en", "zh"):
        _, steps = section(language)
        for rule in RULES:
            assert f"`{rule.cause}`" in steps or f"### {rule.cause}\n" in steps


def _documented(language):
    _, steps = section(language)
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \| (\d+) \|(.*)\|$", steps, re.M)
    return {
        cause: {"opens": int(opens), "closes": int(closes)}
        | {name: float(value) for name, value in re.findall(r"`([A-Z_]+)` ([\d.]*\d)", rest)}
        for cause, opens, closes, rest in rows
    }


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_holds_the_waiting_times_and_thresholds_of_every_rule(language):
    documented = _documented(language)
    assert list(documented) == [rule.cause for rule in RULES]
    for rule in RULES:
        assert documented[rule.cause] == thresholds_of(rule)


def test_both_languages_show_the_same_code():
    codes = {lang: [e[1:3] for e in ENTRIES if e[0] == lang] for lang in ("en", "zh")}
    assert codes["en"] == codes["zh"]
    assert len(codes["en"]) == 6
