"""Ctrl-C at any line of a call of the instrument leaves nothing behind, and is not swallowed."""

import json
import os
import subprocess
import sys

import pytest

CALLS = {  # of so many lines of ours each, one in how many is tried in `make test`
    "diagnose": 20011,
    "check_gradients": 8009,
    "check_accumulation": 353,
    "check_causality": 353,
    "attribute": 353,
    "explain_step": 211,
}


def interrupted(call, every):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.gradients.sandbox.interrupting", call, str(every)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_leaves_nothing_behind(call):
    tried = interrupted(call, CALLS[call])
    assert tried["runs"] > 15
    assert tried["cut"] == tried["runs"]
    assert tried["wrong"] == []


@pytest.mark.soak
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_at_every_line_leaves_nothing_behind(call):
    every = 41 if call == "check_gradients" else 1  # whose 250,000 lines are mostly one loop
    assert interrupted(call, every)["wrong"] == []
