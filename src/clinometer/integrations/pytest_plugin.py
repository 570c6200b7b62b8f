"""pytest's plugin: a team's own layers, checked in its own tests.

    def test_my_layer(assert_gradients):
        layer, x = MyLayer(4), torch.randn(2, 4)
        assert_gradients(layer, lambda: layer(x).square().sum())

pytest loads it in every project that has Clinometer installed, so it imports neither torch nor anything of
Clinometer before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

NAME = "assert_gradients"


class Case(NamedTuple):
    """One round of a marked test."""

    seed: int
    dtype: str | None

    def __str__(self) -> str:
        return f"seed{self.seed}" if self.dtype is None else f"{self.dtype}-seed{self.seed}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "gradients(seeds=1, dtypes=None): run a test that uses assert_gradients once for each seed (a number"
        " of them, or a list) and each default dtype (names such as 'float64'). [Clinometer]",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("gradients")
    if marker is None:
        return
    from clinometer.messages import say

    if NAME not in metafunc.fixturenames:
        pytest.fail(say("integrations.no_fixture", test=metafunc.definition.nodeid), pytrace=False)
    try:
        cases = _cases(*marker.args, **marker.kwargs)
    except (TypeError, ValueError):
        given = ", ".join([*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())])
        pytest.fail(say("integrations.marker", given=given), pytrace=False)
    # Before the test's other fixtures, which may make the model.
    metafunc.fixturenames.remove(NAME)
    metafunc.fixturenames.insert(0, NAME)
    metafunc.parametrize(NAME, cases, indirect=True, ids=list(map(str, cases)))


def _cases(seeds: Any = 1, dtypes: Any = None) -> list[Case]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    names = [dtypes] if dtypes is None or isinstance(dtypes, str) else list(dtypes)
    if not chosen or not names or any(name not in (None, *_DTYPES) for name in names):
        raise ValueError
    return [Case(seed, name) for name in names for seed in chosen]


_DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.fixture(name=NAME)
def _fixture(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`assert_gradients(model, closure)` fails with the report if a gradient is not the derivative."""
    case = getattr(request, "param", None)
    if case is None:
        yield assert_gradients
        return
    import torch

    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    try:
        torch.manual_seed(case.seed)
        if case.dtype is not None:
            torch.set_default_dtype(getattr(torch, case.dtype))
        yield assert_gradients
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


def assert_gradients(params: Any, closure: Callable[[], Any], **options: Any) -> Any:
    """Check the gradients of `params` as `clinometer.check_gradients` does, and return its result.

    `params`: a module, a mapping of names to tensors, or pairs. `closure` returns the scalar loss.
    `options` are those of `check_gradients` (`seed`, `entries`).

    Raises AssertionError with the report (which tensor, rows, entries; which layer) if a gradient is missing
    or is not the derivative of the loss; InputError for what is no set of tensors or no loss.
    """
    __tracebackhide__ = True
    from clinometer import check_gradients

    result = check_gradients(params, closure, **options)
    if not result.passed:
        raise AssertionError("\n" + result.render())
    return result
