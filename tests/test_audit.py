"""The audit of the dependencies: a finding fails, a network that is not there does not."""

import json

import pytest

from tests.audit import verdict

CLEAN = {"name": "numpy", "version": "2.1.0", "vulns": []}
BAD = {"name": "h11", "version": "0.14.0", "vulns": [{"id": "CVE-2025-43859", "fix_versions": ["0.16.0"]}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def told(*dependencies):
    return json.dumps({"dependencies": list(dependencies), "fixes": []})


def test_a_known_vulnerability_fails_and_is_named_with_its_remedy():
    code, words = verdict(told(CLEAN, BAD, SKIPPED), "Found 1 known vulnerability in 1 package")
    assert code == 1
    assert "h11 0.14.0: CVE-2025-43859 (fixed in 0.16.0)" in words


def test_none_passes_and_says_how_many_were_looked_at():
    assert verdict(told(CLEAN, SKIPPED), "") == (
        0,
        "audit: 1 packages, no known vulnerability; 1 unknown to the advisories",
    )


@pytest.mark.parametrize(
    ("said", "complained"),
    [
        ("", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed"),
        ("", "requests.exceptions.ConnectionError: Max retries exceeded with url: /pypi/numpy/2.1.0/json"),
        ("", "Read timed out: Command '['pip_audit']' timed out after 900 seconds"),
        ("", "ReadTimeout: Read timed out. (read timeout=15)"),
        (told(SKIPPED, SKIPPED), ""),
    ],
)
def test_advisories_that_cannot_be_reached_are_said_and_pass(said, complained):
    code, words = verdict(said, complained)
    assert code == 0
    assert "could not be reached" in words


@pytest.mark.parametrize("said", ["", "not json", "{}", "[]"])
def test_anything_else_fails(said):
    code, words = verdict(said, "TypeError: unexpected keyword")
    assert code == 2
    assert "TypeError" in words
