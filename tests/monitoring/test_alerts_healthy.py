"""A healthy run is silent."""

import pytest
import torch

from clinometer.monitoring.alerts.alerts import render
from tests.monitoring.healthy import HEALTHY
from tests.monitoring.sink import Kept


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_healthy_run_is_silent(name):
    if name in ("gpt2", "bert", "t5"):
        pytest.importorskip("transformers")
    torch.manual_seed(1)
    sink = Kept()
    HEALTHY[name](sink)
    assert len(sink.rows) >= 100
    assert [render(alert) for alert in sink.told] == []
