"""schemathesis on the API's description: to all that it allows or forbids the answer is data or a sentence.

`make test` tries some 200 requests, `make soak` 20,000 (`CLINOMETER_REQUESTS` for each operation and mode).
"""

import copy
import json
import os
import sys
import warnings

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from clinometer.messages import sentences
from clinometer.view.http import api_figures
from clinometer.view.http.openapi import description
from clinometer.view.http.safety import HEADERS
from tests.view.conftest import BASE, NAME, open_client

SENT = ("method", "url", "params", "json", "data", "headers", "cookies")
FEW = 4
MANY = int(os.environ.get("CLINOMETER_REQUESTS", "500"))
LIVE = "/api/live"
"""Its answer has no end: test_live.py listens to it."""
OPERATIONS = [(m.upper(), p) for p, methods in description()["paths"].items() for m in methods if p != LIVE]


@pytest.fixture(scope="module")
def app_client(runs):
    with open_client(runs) as client:
        client.app.state.replays._command = [sys.executable, "-c", "pass"]
        yield client


@pytest.fixture(scope="module")
def schema(app_client):
    """The published description, told what there is to ask for: from bare texts it would only get 404s."""
    document = copy.deepcopy(app_client.get("/api/openapi.json").json())
    ids = [run["id"] for run in app_client.get("/api/runs").json()["runs"]]
    known = {
        "id": ids,
        "ids": [*ids, ",".join(ids)],
        "name": sorted(api_figures._FIGURES),
        "tensor": [NAME, "lm_head.weight"],
        "tensors": ["0", "0,1,2", "29,0"],
        "stat": ["grad_norm", "update_ratio", "grad_norm,cosine"],
        "index": ["0,0", "3,5"],
        "step": [1, 40, 666, 2000],
        "kind": ["grad", "weight", "validation"],
        "position": ["0,0"],
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                if parameter["name"] in known:
                    parameter["schema"] = {"enum": known[parameter["name"]]}
    return schemathesis.openapi.from_dict(document)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[" ".join(pair) for pair in OPERATIONS])
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])
def test_every_request_gets_data_or_a_sentence(app_client, schema, method, path, count):
    operation = schema[path][method]
    answers = {}

    def attempt(case):
        parts = case.as_transport_kwargs(base_url=BASE)
        parts = {name: parts[name] for name in SENT if parts.get(name) is not None}
        if "data" in parts:
            parts["content"] = parts.pop("data")
        parts["headers"] = {"origin": BASE, **parts.get("headers", {})}
        answer = app_client.request(**parts)
        answers[answer.status_code] = answers.get(answer.status_code, 0) + 1
        check(answer)

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        if mode is GenerationMode.NEGATIVE and not description()["paths"][path][method.lower()]["parameters"]:
            continue  # nothing about it can be wrong
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings(
                max_examples=count,
                deadline=None,
                database=None,
                derandomize=count == FEW,
                suppress_health_check=list(HealthCheck),
            )(given(operation.as_strategy(generation_mode=mode))(attempt))()
    print(f"{method} {path}: {dict(sorted(answers.items()))}")
    assert answers


def check(answer):
    """Never a 5xx; what is refused is refused in a sentence; the headers are on all."""
    assert answer.status_code < 500, answer.text
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
        error = json.loads(answer.text)["error"]
        assert error["text"]
        assert error["key"] in sentences("en")
    elif answer.status_code < 300:
        json.loads(answer.text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
