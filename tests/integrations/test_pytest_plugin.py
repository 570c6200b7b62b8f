"""A team's layers in its own tests: wrong ones fail with the report, and who does not ask pays nothing."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest_plugins = "pytester"

PLUGIN = "clinometer.integrations.pytest_plugin"

LAYERS = """
import pytest, torch
from torch import nn

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * {factor} * x

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return Square.apply(x @ self.weight.T)
"""

TEST = """
def test_layer(assert_gradients):
    layer, x = Layer(), torch.randn(2, 4)
    result = assert_gradients(layer, lambda: layer(x).sum())
    assert result["weight"].passed
"""


@pytest.fixture
def outcome(pytester: pytest.Pytester):
    """Runs a test file in a pytest of its own, with the plugin loaded as an installed one is."""
    installed = any(entry.value == PLUGIN for entry in entry_points(group="pytest11"))

    def run(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        plugin = () if installed else ("-p", PLUGIN)
        return pytester.runpytest_inprocess(*plugin, "--strict-markers", "-p", "no:cacheprovider", *arguments)

    return run


def test_a_wrong_backward_fails_with_the_report_and_a_right_one_passes(outcome) -> None:
    wrong = outcome(LAYERS.format(factor=3) + TEST)
    wrong.assert_outcomes(failed=1)
    wrong.stdout.fnmatch_lines(["E*✗ The backward of Square is wrong", "E*weight*1.5 times*"])
    shown = wrong.stdout.str()
    assert "def assert_gradients" not in shown  # the report, and not our lines
    outcome(LAYERS.format(factor=2) + TEST).assert_outcomes(passed=1)


def test_a_wrong_row_is_named(outcome) -> None:
    row = LAYERS.format(factor=2).replace("return grad * 2 * x", "g = grad * 2 * x; g[:, 1] = 0; return g")
    failed = outcome(row + TEST)
    failed.assert_outcomes(failed=1)
    assert "[1," in failed.stdout.str()


def test_a_layer_that_cuts_its_weight_off_fails(outcome) -> None:
    cut = LAYERS.format(factor=2).replace("x @ self.weight.T", "x @ self.weight.detach().T")
    failed = outcome(cut + TEST)
    failed.assert_outcomes(failed=1)
    assert "weight" in failed.stdout.str()


def test_the_marker_repeats_a_test_for_seeds_and_precisions(outcome) -> None:
    marked = """
seen = []

@pytest.fixture
def layer():  # made after the seed was set
    return Layer()

@pytest.mark.gradients(seeds=2, dtypes=["float64", "float32"])
def test_layer(layer, assert_gradients):
    x = torch.randn(2, 4)
    assert_gradients(layer, lambda: layer(x).sum())
    seen.append((str(layer.weight.dtype), float(layer.weight[0, 0])))

def test_what_was_seen():
    torch.manual_seed(0)
    first = float(torch.randn(3, 4, dtype=torch.float64)[0, 0])
    assert seen[0] == ("torch.float64", first)
    assert [dtype for dtype, _ in seen] == ["torch.float64"] * 2 + ["torch.float32"] * 2
    assert len({value for _, value in seen}) == 4
    assert torch.get_default_dtype() is torch.float32
"""
    done = outcome(LAYERS.format(factor=2) + marked, "-v")
    done.assert_outcomes(passed=5)
    done.stdout.fnmatch_lines(["*test_layer?float64-seed0?*", "*test_layer?float32-seed1?*"])


@pytest.mark.parametrize(
    ("marker", "arguments", "said"),
    [
        ("seeds=2", "", "*does not use assert_gradients*"),
        ("seeds=0", "assert_gradients", "*gradients(seeds=0) is not understood*"),
        ("dtypes=['int8']", "assert_gradients", "*is not understood*float64*"),
        ("depth=3", "assert_gradients", "*gradients(depth=3) is not understood*"),
    ],
)
def test_a_marker_that_cannot_be_meant_is_refused_in_words(outcome, marker, arguments, said) -> None:
    text = f"import pytest\n@pytest.mark.gradients({marker})\ndef test_it({arguments}): pass\n"
    done = outcome(text)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines([said])


def test_a_suite_that_does_not_use_it_pays_no_import() -> None:
    script = (
        f"import sys, {PLUGIN}\n"
        "assert not {'torch', 'numpy', 'rich', 'clinometer.messages'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
