"""Tensors that get no gradient are named and never pass; a loss that cannot be checked says why."""

import pytest
import torch
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients


def parted(cut):
    """Two layers, the second's input detached or not, and one that nobody uses."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 2), "spare": nn.Linear(4, 4)})
    x = torch.randn(5, 4)

    def loss():
        h = model["first"](x)
        return model["last"](h.detach() if cut else h).square().mean()

    return model, loss


def test_tensors_cut_from_the_loss_are_named_and_never_pass():
    check = check_gradients(*parted(cut=True))
    cut, unused = check.findings
    assert (cut.cause, cut.names) == ("no-gradient-cut", ("first.weight", "first.bias"))
    assert (unused.cause, unused.names) == ("no-gradient", ("spare.weight", "spare.bias"))
    assert {finding.severity for finding in check.findings} == {"explained"}
    assert {check[name].status for name in (*cut.names, *unused.names)} == {"no-gradient"}
    assert check["last.weight"].passed
    assert check.healthy
    assert not check.passed
    told = " ".join(check.render("en").split())
    assert "2 of 6 tensors get no gradient (None)" in told
    assert "clinometer diagnose" in told
    assert "2 of 6 tensors pass." in told
    assert "✓" not in check.render("en") + check.render("zh")


def test_a_tensor_that_is_not_used_is_not_called_cut():
    check = check_gradients(*parted(cut=False))
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("no-gradient", "explained")
    assert finding.names == ("spare.weight", "spare.bias")
    assert check["first.weight"].passed


@pytest.mark.parametrize("number", [".item()", "no_grad", "frozen"])
def test_a_loss_without_a_graph_is_an_error_that_points_to_diagnose(number):
    model = nn.Linear(4, 2).requires_grad_(number != "frozen")
    x = torch.randn(5, 4)

    def loss():
        if number == "no_grad":
            with torch.no_grad():
                return model(x).square().mean()
        value = model(x).square().mean()
        return torch.tensor(value.item()) if number == ".item()" else value

    check = check_gradients(model, loss)
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("loss-without-graph", "fault")
    assert not check.healthy
    assert not check.passed
    assert {check[name].status for name in check} == {"unchecked" if number == "frozen" else "no-gradient"}
    assert "diagnose(params, closure)" in check.render("en")
    assert "✓" not in check.render("en")


def test_where_no_tensor_at_all_is_reached_nothing_was_checked_and_that_is_a_fault():
    model, copy = nn.Linear(4, 2), nn.Linear(4, 2)
    x = torch.randn(5, 4)
    check = check_gradients(copy, lambda: model(x).square().mean())
    (finding,) = check.findings
    assert (finding.cause, finding.severity, len(finding.names)) == ("no-gradient", "fault", 2)


def test_frozen_tensors_do_not_keep_a_model_from_passing():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    x = torch.randn(5, 4)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert check.passed
    assert check.findings == ()
    assert "all 2 tensors that ask for one" in " ".join(check.render("en").split())
    frozen = check_gradients({"w": model[0].weight}, lambda: model(x).square().mean())
    assert frozen.healthy
    assert not frozen.passed
    assert "✓" not in frozen.render("en")


def test_a_parameter_that_is_itself_the_loss_passes():
    w = torch.tensor(2.0, requires_grad=True)
    assert check_gradients({"w": w}, lambda: w).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_tensor_that_was_written_over_is_told_with_the_line_as_diagnose_does(dtype):
    model = nn.Linear(4, 4, dtype=dtype)
    x = torch.randn(6, 4, dtype=dtype)

    def loss():
        h = model(x).exp()  # the line
        h += 1
        return h.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
        check_gradients(model, loss)
    (note,) = raised.value.__notes__
    assert "h = model(x).exp()  # the line" in note
    assert model.weight.dtype == dtype
    assert model.weight.grad is None
