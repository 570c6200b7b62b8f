"""Planted mistakes: each is found, at the right tensor, place and line, and nothing else is accused."""

import inspect

import pytest
import torch
from tests.gradients.check import broken
from tests.gradients.check.broken import Apply, BrokenLinear, BrokenNorm
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.check_gradients import MOST_NARROWED, check_gradients


def checked(layers, inputs=6, rows=12, **options):
    """The check of a small network with a regression loss."""
    model = nn.Sequential(*layers)
    x = torch.randn(rows, inputs)
    target = torch.randn_like(model(x).detach())
    return check_gradients(model, lambda: F.mse_loss(model(x), target), **options)


def wrong(check):
    return [name for name in check if check[name].status == "wrong"]


def the_fault(check):
    """The one finding there must be."""
    assert not check.healthy
    assert not check.passed
    (finding,) = check.findings
    assert finding.cause == "wrong-backward"
    return finding


def line_of_backward(function):
    lines, first = inspect.getsourcelines(function.backward)
    return first + next(i for i, line in enumerate(lines) if "def backward" in line)


LINEAR_LINE = next(
    i
    for i, line in enumerate(inspect.getsource(broken).splitlines(), 1)
    if "def backward" in line  # the first in the file is Linear's
)


MISTAKES = {
    "sign of x": (lambda dx, dw, db, x, w, g: (-dx, dw, db), {"0.weight": -1, "0.bias": -1}, ["input"]),
    "sign of w": (lambda dx, dw, db, x, w, g: (dx, -dw, db), {"2.weight": -1}, ["weight"]),
    "factor 2": (lambda dx, dw, db, x, w, g: (dx, 2 * dw, db), {"2.weight": 2}, ["weight"]),
    "bias forgotten": (lambda dx, dw, db, x, w, g: (dx, dw, None), {"2.bias": 0}, ["bias"]),
    "bias of zeros": (lambda dx, dw, db, x, w, g: (dx, dw, db * 0), {"2.bias": 0}, ["bias"]),
    "two percent": (lambda dx, dw, db, x, w, g: (dx, dw, db * 1.02), {"2.bias": 1.02}, ["bias"]),
    "mean for sum": (
        lambda dx, dw, db, x, w, g: (0.5 * dx, dw, db / 12),
        {"0.weight": 0.5, "0.bias": 0.5, "2.bias": 1 / 12},
        ["input", "bias"],
    ),
}


@pytest.mark.parametrize(("mistake", "expected", "parts"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_factor_is_named_with_its_tensors_and_the_line_of_the_backward(mistake, expected, parts):
    check = checked([nn.Linear(6, 6), nn.Tanh(), BrokenLinear(6, 6, mistake), nn.Linear(6, 3)])
    finding = the_fault(check)
    assert wrong(check) == sorted(expected, key=list(check).index)
    assert set(finding.names) == set(expected)
    for name, factor in expected.items():
        assert check[name].narrowed.factor == pytest.approx(factor, abs=5e-8 if factor else 0)
        # The numbers are the right derivative: analytic is `factor` times numeric.
        assert check[name].analytic == pytest.approx(factor * check[name].numeric, rel=1e-6)
    assert finding.where.label == f"broken.py:{LINEAR_LINE}"
    assert {check[name].where for name in expected} == {finding.where}
    assert finding.where.function.endswith("Linear.backward")
    layer = next(layer for layer in check.wrong_layers if layer.function)
    assert (layer.path, layer.kind) == ("2", "Linear")
    assert [layer.path for layer in check.wrong_layers if not layer.function] == ["2"]
    (module,) = [layer for layer in check.wrong_layers if not layer.function]
    assert list(module.wrong_parts) == parts


def test_a_transposed_product_is_called_a_transpose():
    check = checked(
        [nn.Linear(6, 6), BrokenLinear(6, 6, lambda dx, dw, db, x, w, g: (dx, dw.T, db)), nn.Tanh()]
    )
    the_fault(check)
    assert wrong(check) == ["1.weight"]
    assert check["1.weight"].narrowed.transposed
    assert "transpose of the right gradient" in check.render("en")


def test_a_transposed_input_product_spoils_what_lies_upstream():
    check = checked(
        [nn.Linear(6, 6), BrokenLinear(6, 6, lambda dx, dw, db, x, w, g: (g @ w.T, dw, db)), nn.Tanh()]
    )
    the_fault(check)
    assert wrong(check) == ["0.weight", "0.bias"]
    assert check["0.weight"].narrowed.factor is None


@pytest.mark.parametrize(("forget", "expected"), [("weight", ["1.weight"]), ("term", ["0.weight", "0.bias"])])
def test_what_a_layer_norm_forgets_is_found(forget, expected):
    check = checked([nn.Linear(6, 8), BrokenNorm(8, forget), nn.Linear(8, 3)])
    finding = the_fault(check)
    assert wrong(check) == expected
    assert finding.where.line == line_of_backward(broken.NormFunction)
    assert finding.where.module == "1"
    if forget == "weight":
        assert check["1.weight"].narrowed.factor == 0
        assert check["1.weight"].has_gradient


@pytest.mark.parametrize("function", [broken.MaskedReluFunction, broken.RareFunction])
def test_a_wrong_mask_and_a_rare_branch_are_found(function):
    torch.manual_seed(3)
    first = nn.Linear(6, 8)
    with torch.no_grad():
        first.weight.mul_(3)  # some, not most, of its outputs are above 2
    check = checked([first, Apply(function), nn.Linear(8, 3)], rows=40)
    finding = the_fault(check)
    assert wrong(check) == ["0.weight", "0.bias"]
    assert finding.values["kind"] == function.__name__
    assert finding.where.line == line_of_backward(function)


def test_an_error_in_one_sample_of_the_batch_is_found():
    x = torch.randn(40, 6)
    x[:, 0] = 0.0
    x[17, 0] = 2.5  # the only row with the branch
    model = nn.Sequential(Apply(broken.RareFunction), nn.Linear(6, 3))
    scale = torch.ones(6, requires_grad=True)
    check = check_gradients(
        {"scale": scale, **dict(model.named_parameters())}, lambda: model(x * scale).square().mean()
    )
    the_fault(check)
    assert wrong(check) == ["scale"]


def test_one_wrong_entry_by_one_percent_in_a_million_is_localised_to_it():
    def mistake(dx, dw, db, x, w, g):
        dw = dw.clone()
        dw[731, 402] *= 1.01
        return dx, dw, db

    check = checked([BrokenLinear(1000, 1000, mistake)], inputs=1000, rows=4)
    the_fault(check)
    assert wrong(check) == ["0.weight"]
    narrowed = check["0.weight"].narrowed
    assert (narrowed.rows, narrowed.columns) == (((731, 731),), ((402, 402),))
    (entry,) = check["0.weight"].wrong_entries
    assert entry.index == (731, 402)
    # To a hundredth of the one percent; the rest is the rounding of the differences: 1e-6 on some processors.
    assert entry.analytic == pytest.approx(1.01 * entry.numeric, rel=1e-4)
    assert check.evaluations < 400


def test_wrong_rows_and_columns_are_given_as_ranges():
    def mistake(dx, dw, db, x, w, g):
        dw = dw.clone()
        dw[32:64] *= 1.5
        return dx, dw, db

    check = checked([BrokenLinear(10, 64, mistake)], inputs=10)
    narrowed = check["0.weight"].narrowed
    assert narrowed.rows == ((32, 63),)
    assert narrowed.all_columns
    assert "rows 32–63" in check.render("en")

    def columns(dx, dw, db, x, w, g):
        dw = dw.clone()
        dw[:, 3:5] = 0
        return dx, dw, db

    narrowed = checked([BrokenLinear(10, 64, columns)], inputs=10)["0.weight"].narrowed
    assert narrowed.all_rows
    assert narrowed.columns == ((3, 4),)


def test_a_rotation_that_does_not_turn_back_is_found_in_every_layer_as_one_finding():
    class Rotary(nn.Module):
        def forward(self, x):
            angle = torch.arange(x.shape[0])[:, None] * torch.tensor([1.0, 0.1, 0.01])
            return broken.RotaryFunction.apply(x, angle.cos(), angle.sin())

    check = checked([nn.Linear(6, 6), Rotary(), nn.Linear(6, 6), Rotary(), nn.Linear(6, 2)])
    finding = the_fault(check)
    assert wrong(check) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert finding.values["layer"] == "1, 3"
    assert finding.where.line == line_of_backward(broken.RotaryFunction)


def test_values_changed_behind_autograds_back_are_found_at_the_line_that_takes_the_alias():
    class Scaled(nn.Module):
        def forward(self, x):
            h = x.tanh()
            h.data.mul_(2)  # the line
            return h

    check = checked([nn.Linear(6, 6), Scaled(), nn.Linear(6, 2)])
    finding = the_fault(check)
    assert wrong(check) == ["0.weight", "0.bias"]
    assert finding.where.source == "h.data.mul_(2)  # the line"
    assert finding.values["layer"] == "1"


def test_a_hook_on_a_tensor_is_named_and_not_accused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[0].weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    x = torch.randn(5, 6)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert check.healthy
    assert [finding.cause for finding in check.findings] == ["hooked"]
    assert check["0.weight"].status == "surrogate"


def test_a_wrong_backward_without_any_module_is_found():
    w = torch.randn(5, 5, requires_grad=True)
    b = torch.zeros(5, requires_grad=True)
    x = torch.randn(7, 5)
    function = broken.linear_function(lambda dx, dw, db, x, w, g: (dx, dw, 3 * db))
    check = check_gradients({"w": w, "b": b}, lambda: function.apply(x, w, b).square().mean())
    finding = the_fault(check)
    assert wrong(check) == ["b"]
    assert check["b"].narrowed.factor == pytest.approx(3)
    assert finding.where.line == LINEAR_LINE


def test_the_backward_of_a_frozen_first_layer_is_judged_though_no_tensor_needs_it():
    check = checked([BrokenLinear(6, 6, lambda dx, dw, db, x, w, g: (dx * 7, dw, db)), nn.Tanh()])
    assert check.passed  # its input needs no gradient, so the wrong line never runs


def test_entries_that_are_asked_for_are_differenced_one_by_one():
    def mistake(dx, dw, db, x, w, g):
        dw = dw.clone()
        dw[2, 1] += 1
        return dx, dw, db

    check = checked([BrokenLinear(6, 6, mistake)], entries={"0.weight": [(2, 1), (0, 0)], "0.bias": [3]})
    wrong_one, right = check["0.weight"].entries
    assert wrong_one.analytic - wrong_one.numeric == pytest.approx(1, rel=1e-8)
    assert not wrong_one.passed
    assert right.passed
    assert right.error <= right.tolerance < 1e-7
    assert check["0.bias"].entries[0].passed


def test_a_write_to_a_repeated_index_gets_a_wrong_gradient_from_torch_and_it_is_found():
    w = torch.randn(3, 4, requires_grad=True)

    def loss():
        out = torch.zeros(5, 4)
        out[torch.tensor([1, 1, 3])] = w  # row 0 or row 1 of w is lost; autograd gives both a gradient
        return out.exp().sum()

    check = check_gradients({"w": w}, loss)
    (finding,) = check.findings
    assert (finding.cause, finding.names) == ("wrong-gradient", ("w",))
    assert "where an index occurs twice" in " ".join(check.render("en").split())
    ((first, last),) = check["w"].narrowed.rows
    assert first == last
    assert first in (0, 1)
    assert {entry.index[0] for entry in check["w"].wrong_entries} == {first}
    assert all(abs(entry.numeric) < entry.tolerance for entry in check["w"].wrong_entries)


def test_a_fault_at_the_end_of_a_deep_network_is_not_looked_for_inside_every_tensor_before_it():
    layers = [layer for _ in range(10) for layer in (nn.Linear(6, 6), nn.Tanh())]
    check = checked([*layers, BrokenLinear(6, 6, lambda dx, dw, db, x, w, g: (-dx, 2 * dw, db))])
    finding = the_fault(check)
    assert len(finding.names) == 21
    assert sum(check[name].narrowed is not None for name in check) == MOST_NARROWED
    assert check["20.weight"].narrowed.factor == pytest.approx(2)
    assert check.evaluations < 1150


def test_a_function_called_outside_every_layer_names_no_caller():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return torch.ones_like(grad)

    model = torch.nn.Linear(3, 2)
    check = check_gradients(model, lambda: (Twice.apply(model(torch.ones(4, 3))) ** 2).mean())
    assert check.findings[0].cause == "wrong-backward"
    for language, caller in (("en", "called in"), ("zh", "调用者")):
        text = check.render(language, width=400)
        assert "Twice" in text
        assert caller not in text
