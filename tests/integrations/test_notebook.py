"""What a notebook shows: each result as HTML, a watch as HTML, and a run live."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import clinometer
from clinometer.gradients.report.result import Result
from clinometer.integrations.notebook import LiveRun
from clinometer.messages import InputError, set_language


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, factor: float = 1.0) -> None:
    for _ in range(steps):
        (model(torch.randn(8, 4)).square().mean() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_kind_of_result_has_its_html() -> None:
    model, optimizer = model_and_optimizer()
    x = torch.randn(8, 4)

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    def part(some: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: model(some).square().mean() / 2

    embedding = nn.Embedding(5, 5)
    with clinometer.explain_step(optimizer, model) as anatomy:
        loss().backward()
        optimizer.step()
    results = [
        clinometer.diagnose(model, loss),
        clinometer.check_gradients(model, loss),
        clinometer.check_accumulation(model, loss, [part(x[:4]), part(x[4:])]),
        clinometer.check_causality(embedding, embedding, torch.arange(4)[None]),
        anatomy,
        anatomy["0.weight"],
        anatomy["0.weight"][0, 1],
        clinometer.attribute(model, loss, "0.weight", (0, 1)),
    ]
    kinds = {type(result) for result in results}
    assert len(kinds) == len(results)
    assert all(issubclass(kind, Result) for kind in kinds)
    for result in results:
        html = result._repr_html_()
        assert html.startswith(("<div", "<pre")), html[:80]
        assert html.count("<div") == html.count("</div>")


def test_a_watch_shows_how_far_it_is_and_its_alerts(tmp_path: Path, capsys) -> None:
    model, optimizer = model_and_optimizer()
    watch = clinometer.watch(model, optimizer, tmp_path / "run")
    train(model, optimizer, 3)
    assert str(watch).split("\n")[0] == "Watching 4 tensors: step 3."
    assert "not enough steps yet for every rule (2 of 50)" in watch._repr_html_()
    train(model, optimizer, 1, float("nan"))
    watch.close()
    assert "4 tensors were watched, up to step 4." in str(watch)
    assert "✗ Step 4: 19 entries of the gradients of 4 tensors are NaN or infinite" in " ".join(
        str(watch).split()
    )
    assert "0.weight" in watch._repr_html_()


def test_the_live_view_follows_the_run_file(tmp_path: Path, capsys) -> None:
    model, optimizer = model_and_optimizer()
    watch = clinometer.watch(model, optimizer, tmp_path / "run")
    with contextlib.closing(LiveRun(watch, seconds=3600)) as view:
        assert (view.shown["live"], view.shown["loss"]["step"]) == (True, [])
        train(model, optimizer, 5)
        watch.flush()
        view.refresh()
        assert view.shown["title"] == "run"
        assert view.shown["loss"]["step"] == [1, 2, 3, 4, 5]
        assert all(value > 0 for value in view.shown["loss"]["value"])
        assert view.shown["facts"][:2] == ["live", "step 5"]
        rows = view.shown["tensors"]["rows"]
        assert [row[0] for row in rows] == watch.names
        assert all(float(number) > 0 for row in rows for number in (row[1], row[3], row[4]))
        assert view.shown["alerts"] == []
        before = view.shown
        view.refresh()
        assert view.shown is before  # nothing new, nothing sent
        train(model, optimizer, 1, float("inf"))
        watch.close()
        view.refresh()
        assert view.shown["live"] is False
        assert view.shown["facts"][0] == "done"
        assert view.shown["loss"]["value"][5] is None  # not finite: JSON has no such number
        (alert,) = view.shown["alerts"]
        assert (alert["open"], alert["severity"]) == (True, "fault")
        assert "Step 6" in alert["text"]


def test_the_live_view_updates_by_itself_and_ends_with_the_run(tmp_path: Path, capsys) -> None:
    model, optimizer = model_and_optimizer()
    watch = clinometer.watch(model, optimizer, tmp_path / "run")
    view = LiveRun(tmp_path / "run", seconds=0.01)
    heard = []
    view.observe(lambda change: heard.append(change["new"]["live"]), "shown")
    train(model, optimizer, 4)
    watch.close()
    until = time.monotonic() + 300
    while view.shown["live"] and time.monotonic() < until:
        time.sleep(0.01)
    assert view.shown["loss"]["step"] == [1, 2, 3, 4]
    assert heard[-1] is False
    view.close()


def test_the_live_view_speaks_chinese_and_refuses_what_has_no_run(tmp_path: Path, capsys) -> None:
    class Nowhere:
        def begin(self, run): ...
        def tensors(self, tensors): ...
        def step(self, step, time, scalars, statistics): ...
        def histograms(self, step, counts): ...
        def alert(self, alert): ...
        def weights(self, step, rows): ...
        def event(self, step, time, kind, data): ...
        def close(self, state): ...

    model, optimizer = model_and_optimizer()
    with clinometer.watch(model, optimizer, tmp_path / "run") as watch:
        train(model, optimizer, 2)
        set_language("zh")
        try:
            with contextlib.closing(LiveRun(watch)) as view:
                assert view.shown["tensors"]["columns"] == [
                    "张量",
                    "梯度范数",
                    "零的占比",
                    "权重范数",
                    "更新 / 权重",
                ]
        finally:
            set_language(None)
    with pytest.raises(InputError):
        LiveRun(tmp_path / "nothing")
    with (
        clinometer.watch(model, optimizer, Nowhere()) as watch,
        pytest.raises(InputError, match="no run file"),
    ):
        LiveRun(watch)
