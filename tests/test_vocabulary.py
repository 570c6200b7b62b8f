"""A statistic is one entry of the vocabulary and one computation: nothing else names them all."""

import ast
import subprocess
import sys
from pathlib import Path

import clinometer
from clinometer.messages import LANGUAGES, sentences
from clinometer.vocabulary import DERIVED, REGISTRY, STATISTICS

PACKAGE = Path(clinometer.__file__).parent
NAMES = {one.name for one in REGISTRY}
MOST_TOGETHER = 3
"""Names of statistics in one literal: what uses some of them. More would be a list to keep up to date."""

ADDED = """
import sys, types
from pathlib import Path

source = Path(sys.argv[1], "vocabulary.py").read_text()
entry = '_measured("grad_sum", _G, OverRanks.SUM, "grad", log=False),'
source = source.replace('_measured("moment_norm"', entry + '_measured("moment_norm"')
added = types.ModuleType("clinometer.vocabulary")
sys.modules[added.__name__] = added
exec(compile(source, "vocabulary.py", "exec"), added.__dict__)
"""

RECORD = (
    ADDED
    + """
from clinometer.monitoring.measure import computations
computations.OF_GRADIENT["grad_sum"] = lambda grad, moment: float(grad.sum())
computations.GRADIENT_PASS.remove(added.COLUMN["grad_sum"])

import csv
import numpy as np, torch
from clinometer.monitoring.measure.rank_sums import _statistics_of, _sums_of
from clinometer.monitoring.watch import watch
from clinometer.record import Recorder, RunFile
from clinometer.record.out.table_export import export
from starlette.testclient import TestClient
from clinometer.view.http.server import make_app

root = Path(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
expected = []
with watch(model, optimizer, Recorder(root / "new")):
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        expected.append(float(model.weight.grad.sum()))
        optimizer.step()
run = RunFile.open(root / "new")
row = run.row(7)["statistics"]
assert row.shape == (2, 9)
np.testing.assert_allclose(run.series([0], "grad_sum")["mean"][0], expected, rtol=1e-6)
windows = run.series([0], "grad_sum", points=2)
assert windows["stride"] > 1
np.testing.assert_allclose(windows["mean"][0, 0], np.mean(expected[: windows["step"][1] - 1]), rtol=1e-5)
export(run, root / "tensors.csv", "tensors")
table = list(csv.DictReader((root / "tensors.csv").open()))
found = [float(row["grad_sum"]) for row in table if row["tensor"] == "weight"]
np.testing.assert_allclose(found, expected, rtol=1e-6)

# On two ranks the sums of the parts are that of the whole.
parts = np.abs(np.random.default_rng(0).normal(size=(2, 1, 9)))
parts[..., added.COLUMN["grad_nonfinite"]] = 0
column = added.COLUMN["grad_sum"]
sums = sum(_sums_of(part, np.array([6.0]), np.ones(1)) for part in parts)
whole = _statistics_of(sums, parts[..., added.COLUMN["grad_max"]].max(0)[None], np.array([12.0]))
np.testing.assert_allclose(whole[:, column], parts[..., column].sum(0))

client = TestClient(make_app(root), base_url="http://127.0.0.1")
told = client.get(f"/api/runs/{run.id}").json()
assert "grad_sum" in told["statistics"]
assert {"name": "grad_sum", "label": "grad_sum"} in told["choices"]
assert client.get(f"/api/runs/{run.id}/map", params={"stat": "grad_sum"}).status_code == 200
figure = client.get(f"/api/runs/{run.id}/figure/tensor", params={"stat": "grad_sum", "tensor": "weight"})
assert figure.status_code == 200, figure.text

# A file of the version before keeps its own columns: it is read, and continued, with those.
old = RunFile.open(root / "old")
assert "grad_sum" not in old.info()["statistics"]
before = old.row(2)["statistics"]
recorder = Recorder(root / "old", continue_from=2)
recorder.begin({"statistics": list(added.STATISTICS)})
recorder.step(3, 1.0, {}, np.arange(18, dtype=np.float32).reshape(2, 9))
recorder.close()
again = RunFile.open(root / "old")
np.testing.assert_array_equal(again.row(2)["statistics"], before)
kept = [added.COLUMN[name] for name in again.info()["statistics"]]
np.testing.assert_array_equal(again.row(3)["statistics"], np.arange(18).reshape(2, 9)[:, kept])
"""
)


def test_a_statistic_that_is_added_reaches_recorder_reader_export_ranks_and_page(tmp_path):
    from clinometer.record import Recorder
    from tests.record.running import statistics

    recorder = Recorder(tmp_path / "old")
    recorder.begin({"name": "old"})
    row = {"shape": [2], "dtype": "float32", "numel": 2, "layer": None, "kind": "x"}
    recorder.tensors([{"name": name, **row} for name in ("a", "b")])
    for step in (1, 2):
        recorder.step(step, float(step), {"loss": 1.0}, statistics(step, 2))
    recorder.close()
    found = subprocess.run(
        [sys.executable, "-c", RECORD, str(PACKAGE), str(tmp_path)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def _literals(tree):
    for node in ast.walk(tree):
        parts = (
            node.elts
            if isinstance(node, ast.Tuple | ast.List | ast.Set)
            else node.keys
            if isinstance(node, ast.Dict)
            else ()
        )
        yield {part.value for part in parts if isinstance(part, ast.Constant)}


def test_no_other_module_lists_the_statistics():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "vocabulary.py":
            for literal in _literals(ast.parse(path.read_text(encoding="utf-8"))):
                assert len(literal & NAMES) <= MOST_TOGETHER, (path, literal & NAMES)
    for path in PACKAGE.rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert sum(name in text for name in NAMES) <= MOST_TOGETHER, path


def test_every_statistic_has_its_sentences_in_every_language():
    for language in LANGUAGES:
        known = sentences(language)
        for one in REGISTRY:
            assert {one.label_key, one.unit_key, one.choice_key} <= set(known), (language, one.name)
            assert f"figure.tensor.healthy_{one.axis}" in known, (language, one.name)


def test_derived_statistics_are_computed_from_measured_ones():
    for name, operands in DERIVED.items():
        assert name not in STATISTICS
        assert set(operands) <= set(STATISTICS)
        assert len(operands) in (1, 2)
