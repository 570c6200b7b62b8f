"""The losses of a small run, fixed: a change that leaves the mathematics alone must not move them.

How far they may move is rounding's part, measured with the settings of tests/docs/stability.py: 2e-6
where the products are float32, 2e-4 with Muon, whose Newton–Schulz is computed in bfloat16. The smallest
change of the mathematics that was tried, an update of Muon one percent too large, moves them by 2e-3.
"""

from dataclasses import replace

import pytest

from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.settings.config import OptimConfig
from tests.training.conftest import Silent, small_config

GOLDEN = {
    "adamw": [5.62492, 5.0909, 4.65571, 4.3786, 4.34034, 4.08659, 5.08024, 4.59859, 4.36158, 4.2756],
    "sgd": [5.62492, 5.4202, 5.26258, 5.10539, 5.17372, 4.96355, 5.42373, 5.26903, 5.15345, 5.10354],
    "muon": [5.62492, 5.26105, 4.91215, 4.76437, 4.6646, 4.56227, 5.28103, 4.94739, 4.75262, 4.6757],
}
TOLERANCES = {"adamw": 2e-5, "sgd": 2e-5, "muon": 5e-4}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_losses_are_the_golden_ones(corpus, tmp_path, name):
    config = replace(small_config(corpus), optim=OptimConfig(name=name, lr=0.3 if name == "sgd" else 1e-2))
    session = prepare.start(config, tmp_path / "run", Silent())
    display = Silent()
    assert train(session, display) is Outcome.DONE
    session.close()
    losses = [row["loss"] for row in display.rows]
    found = [*losses[::4], losses[-1], *(loss for _, loss, _ in display.validations)]
    assert found == pytest.approx(GOLDEN[name], abs=TOLERANCES[name])
