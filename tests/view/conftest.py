"""Synthetic runs, one that was really trained and can be replayed, and the application over them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from clinometer.view.http.server import make_app
from clinometer.vocabulary import STATISTICS
from tests.record.synthetic import synthetic

BASE = "http://127.0.0.1:8713"
OWN = {"x-clinometer": "1", "origin": BASE, "sec-fetch-site": "same-origin"}
NAME = "layers.1.attn.v_proj.weight"
EVIL = "</script><img src=x onerror=alert(1)><b>w</b>.weight"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Three runs: 2,000 steps, one that crashed, and a short one."""
    root = tmp_path_factory.mktemp("runs")
    synthetic(root / "a", 2000, 4, name="first")
    synthetic(root / "deep" / "er" / "b", 300, 1, state="crashed", name="second")
    synthetic(root / "c", 40, 1, state="stopped", name="second")
    return root


@pytest.fixture(scope="session")
def run(runs):
    opened = RunFile.open(runs / "a")
    yield opened
    opened.close()


@pytest.fixture
def client(runs):
    with open_client(runs) as client:
        yield client


@pytest.fixture
def identity(run) -> str:
    return run.id


def open_client(root: Path, **options) -> TestClient:
    """The application as a browser on this machine sees it."""
    return TestClient(
        make_app(root, language="en", **options), base_url=BASE, headers={"accept-encoding": ""}
    )


def record(folder: Path, tensors: list[str], steps: int = 20, **info) -> Path:
    """A small run with tensors of these names, and nothing special in it."""
    recorder = Recorder(folder)
    begin = {"name": folder.name, "started": 1.79e9, "config": {}, "environment": {}, "every": 1}
    begin |= {"statistics": list(STATISTICS), "model": "Net", "optimizers": ["SGD"], **info}
    recorder.begin(begin)
    recorder.tensors(
        [
            {"id": i, "name": name, "shape": [4, 3], "dtype": "float32", "numel": 12}
            | {"group": 0, "layer": None, "kind": "", "position": i}
            for i, name in enumerate(tensors)
        ]
    )
    rows = np.ones((len(tensors), len(STATISTICS)), dtype=np.float32)
    rows[:, 2:4] = 0
    for step in range(1, steps + 1):
        recorder.step(step, 1.79e9 + step, {"loss": 2.0 / step, "total_norm": 1.0, "seconds": 0.5}, rows)
    recorder.close("done")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of twenty steps that our trainer made, with a run file beside it: it can be replayed."""
    from clinometer.training.run import prepare
    from clinometer.training.run.loop import train
    from tests.training.conftest import SENTENCES, Silent, small_config

    root = tmp_path_factory.mktemp("trained")
    before = os.environ.get("CLINOMETER_CACHE")
    os.environ["CLINOMETER_CACHE"] = str(root / "cache")
    corpus = root / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
    folder = root / "run"
    session = prepare.start(small_config(corpus, sample_tokens=0), folder, Silent())
    train(session, Silent())
    session.close()
    if not (folder / "run.sqlite").exists():
        model = session.model
        recorder = Recorder(folder)
        recorder.begin(
            {"name": "trained", "started": 1.79e9, "config": {}, "environment": {}, "every": 1}
            | {"statistics": list(STATISTICS), "model": "TransformerLM", "optimizers": ["AdamW"]}
        )
        recorder.tensors(
            [
                {"id": i, "name": name, "shape": list(p.shape), "dtype": "float32", "numel": p.numel()}
                | {"group": 0, "layer": None, "kind": name, "position": i}
                for i, (name, p) in enumerate(model.named_parameters())
            ]
        )
        rows = np.ones((len(list(model.parameters())), len(STATISTICS)), dtype=np.float32)
        for step in range(1, 21):
            recorder.step(step, 1.79e9 + step, {"loss": 3.0}, rows)
        recorder.close("done")
    yield folder
    if before is None:
        del os.environ["CLINOMETER_CACHE"]
    else:
        os.environ["CLINOMETER_CACHE"] = before
