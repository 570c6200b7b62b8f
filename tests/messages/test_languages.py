"""A file in messages/ is a language: the command line, the API and the page offer it; the rest is English."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clinometer
from clinometer.messages import say

THIRD = """
[language]
name = "Français"

[page]
runs = "Les exécutions"

[cli]
about = "Entraîner des modèles de langue."
"""

ASK = """
import json
from pathlib import Path
from starlette.testclient import TestClient
from clinometer.lessons import lesson_pages
from clinometer.messages import LANGUAGES, say
from clinometer.view.http.openapi import description
from clinometer.view.http.server import make_app

with TestClient(make_app(Path.cwd()), base_url="http://127.0.0.1:8713") as client:
    page = client.get("/").text
    words = client.get("/api/messages?lang=fr").json()
    wrong = client.get("/api/runs/none?lang=fr").json()
schema = description()["paths"]["/api/runs"]["get"]["parameters"][0]["schema"]["enum"]
titles = {code: [one.title for one in lesson_pages.lessons(code)] for code in LANGUAGES}
said = {key: say(key, "fr") for key in ("page.runs", "page.compare")}
print(json.dumps({
    "known": LANGUAGES, "schema": schema, "said": said, "page": page, "words": words, "wrong": wrong,
    "titles": titles,
}))
"""


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs Python with a copy of the package that has a third file in its messages/."""
    place = tmp_path_factory.mktemp("copy") / "src"
    here = Path(clinometer.__file__).parent
    shutil.copytree(here, place / "clinometer", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "clinometer" / "messages" / "fr.toml").write_text(THIRD, encoding="utf-8")
    for language in ("en", "zh"):
        lessons = Path("docs", language, "lessons")
        shutil.copytree(here.parents[1] / lessons, place.parent / lessons)
    environment = {**os.environ, "PYTHONPATH": str(place), "COLUMNS": "110", "PYTHONIOENCODING": "utf-8"}
    environment.pop("CLINOMETER_LANG", None)

    def run(*arguments, **more):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=place,
            env=environment | more,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=240,
        )

    return run


def test_the_command_line_offers_a_third_language(call):
    answered = call("-m", "clinometer", "--help", "--language", "fr")
    assert answered.returncode == 0, answered.stderr
    assert "Entraîner des modèles de langue." in answered.stdout
    assert "--language en|fr|zh chooses the language" in answered.stdout  # a sentence that it lacks
    assert "Entraîner" in call("-m", "clinometer", "--help", CLINOMETER_LANG="fr_CA.UTF-8").stdout
    refused = call("-m", "clinometer", "--help", "--language", "de")
    assert refused.returncode == 2
    assert "en, fr, zh" in refused.stderr


def test_the_page_and_the_api_offer_a_third_language(call):
    answered = call("-c", ASK)
    assert answered.returncode == 0, answered.stderr
    told = json.loads(answered.stdout)
    assert told["known"] == told["schema"] == ["en", "fr", "zh"]
    assert told["said"] == {"page.runs": "Les exécutions", "page.compare": say("page.compare", "en")}
    assert 'data-languages="en fr zh"' in told["page"]
    words = told["words"]
    assert words["languages"] == {"en": "English", "fr": "Français", "zh": "中文"}
    assert words["lang"] == words["tag"] == words["locale"] == "fr"
    assert words["messages"]["page.runs"] == "Les exécutions"
    assert words["messages"]["page.compare"] == say("page.compare", "en")
    assert told["wrong"]["error"]["text"]
    assert told["titles"]["fr"] == told["titles"]["en"] != told["titles"]["zh"]
