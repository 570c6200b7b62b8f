"""No false alarm over 200 seeds, for every healthy model there is; run by `make soak`.

Some hours on one core. With less time: `python -m tests.gradients.soak --minutes 60`.
"""

import pytest
import torch
from tests.gradients import healthy, soak
from tests.gradients.check.broken import BrokenLinear


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", soak.models())
def test_a_healthy_model_is_not_accused_over_two_hundred_seeds(name, monkeypatch):
    monkeypatch.setattr(healthy, "LAYERS", 1)
    build, tally = soak.models()[name], soak.Tally()
    for seed in range(soak.SEEDS):
        soak.false_alarms(name, build, seed, tally)
    assert tally.seeds == soak.SEEDS
    assert tally.alarms == []


def test_the_soak_reports_an_accusation_and_counts(capsys):
    def build(seed):
        wrong = seed == 1
        model = BrokenLinear(3, 2, lambda dx, dw, db, x, w, g: (dx, dw * (1 + wrong), db))
        x = torch.randn(4, 3)
        return model, lambda: model(x).square().mean()

    *_, (_, tallies) = soak.soak({"planted": build}, range(3), float("inf"))
    assert tallies["planted"].seeds == 3
    assert {alarm.partition(":")[0] for alarm in tallies["planted"].alarms} == {"seed 1"}
    assert "planted, seed 1: finding wrong-backward" in capsys.readouterr().out


def test_the_soak_stops_when_its_time_is_over():
    *_, (_, tallies) = soak.soak(soak.models(), range(200), 0.0)
    assert all(tally.seeds == 0 for tally in tallies.values())
    assert len(tallies) > 80
