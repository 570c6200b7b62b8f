"""A run of 100,000 steps and about 300 tensors: every answer in time. `make soak` runs it."""

import time

import pytest

from tests.record.synthetic import synthetic
from tests.view.conftest import open_client

NAME = "layers.20.attn.v_proj.weight"
INTERACTION = 0.1
FIRST_PAINT = 1.0
ROUNDS = 5

OPENING = (
    "/api/runs",
    "",
    "/strip",
    "/map?columns=1280",
    "/figure/loss",
    "/figure/norm",
    "/figure/lr",
    "/figure/speed",
)
CLICKS = (
    "/map?columns=1280&stat=update_ratio",
    "/map?columns=1280&stat=grad_max",
    "/map?columns=1280&from=20000&to=60000",
    "/map?columns=1280&from=40000&to=41000",
    "/figure/loss?from=20000&to=30000",
    "/figure/norm?from=99000&to=100000",
    f"/figure/tensor?tensor={NAME}",
    f"/figure/tensor?tensor={NAME}&stat=grad_norm,weight_norm,update_ratio,cosine",
    f"/figure/tensor?tensor={NAME}&from=50000&to=60000",
    f"/figure/ridge?tensor={NAME}",
    f"/figure/histogram?tensor={NAME}&step=50000",
    "/step?step=50000",
    "/events?kind=validation",
    "/alerts",
    "/reports",
)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    root = tmp_path_factory.mktemp("big")
    synthetic(root / "run", 100_000, 42)
    with open_client(root) as client:
        yield client, client.get("/api/runs").json()["runs"][0]["id"]


def seconds(client, path):
    """CPU and wall-clock time of the quickest of some rounds.

    The CPU time is judged: on a shared machine the wall clock measures the neighbours.
    """
    cpu = wall = float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time(), time.perf_counter()
        answer = client.get(path)
        cpu = min(cpu, time.process_time() - begin[0])
        wall = min(wall, time.perf_counter() - begin[1])
        assert answer.status_code == 200, answer.text
    return cpu, wall


@pytest.mark.soak
def test_the_first_paint_takes_less_than_a_second_and_every_click_less_than_a_tenth(big):
    client, identity = big
    base = f"/api/runs/{identity}"
    taken = {
        part: seconds(client, part if part.startswith("/api") else base + part) for part in OPENING + CLICKS
    }
    paint = sum(taken[part][0] for part in OPENING)
    for part, (cpu, wall) in taken.items():
        print(f"{1e3 * cpu:7.1f} ms CPU {1e3 * wall:7.1f} ms wall  {part}")
    print(f"{1e3 * paint:7.1f} ms CPU  first paint")
    assert paint < FIRST_PAINT
    assert {part: cpu for part, (cpu, _) in taken.items() if cpu >= INTERACTION} == {}
