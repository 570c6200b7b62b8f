import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from clinometer.gradients.sandbox.closure import eagerly, evaluate, replay
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.messages import InputError

LOSS = torch.tensor(2.5)


@pytest.mark.parametrize(
    "came",
    [
        LOSS,
        LOSS.reshape(1, 1),
        {"loss": LOSS, "logits": torch.ones(3)},
        SimpleNamespace(loss=LOSS),
    ],
)
def test_a_scalar_loss_is_accepted_in_the_shapes_people_return_it(came):
    assert evaluate(lambda: came).item() == 2.5


@pytest.mark.parametrize(
    ("came", "key"),
    [
        (None, "none"),
        (2.5, "plain_number"),
        (2, "plain_number"),
        (torch.ones(3), "vector"),
        (torch.ones(0), "vector"),
        (torch.tensor(1j), "complex"),
        (torch.tensor(1), "integer"),
        (torch.tensor(True), "integer"),
        ((LOSS, torch.ones(3)), "tuple"),
        ([LOSS], "tuple"),
        ({"logits": LOSS}, "no_loss"),
        ({"loss": None}, "no_loss"),
        (SimpleNamespace(loss=None), "no_loss"),
        ("2.5", "kind"),
        (numpy.ones(1), "kind"),
    ],
)
def test_what_is_no_loss_is_refused_with_what_came(came, key):
    with pytest.raises(InputError) as caught:
        evaluate(lambda: came)
    assert caught.value.key == f"gradients.closure.{key}"
    assert str(caught.value) != caught.value.render("zh")


def test_a_transformers_output_stands_for_its_loss():
    output = pytest.importorskip("transformers.modeling_outputs").CausalLMOutput
    assert evaluate(lambda: output(loss=LOSS, logits=torch.ones(3))) is LOSS
    with pytest.raises(InputError, match="labels="):
        evaluate(lambda: output(logits=torch.ones(3)))


def test_the_loss_itself_in_place_of_a_closure_is_refused():
    with pytest.raises(InputError, match="has to be computed anew"):
        evaluate(LOSS)
    with pytest.raises(InputError, match="cannot be called"):
        evaluate(3)


def test_the_loss_has_a_graph_even_where_the_caller_turned_autograd_off():
    weight = torch.ones(2, requires_grad=True)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert evaluate(lambda: weight.sum()).grad_fn is not None


def test_a_fault_of_the_closure_passes_through():
    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(closure)


def test_a_replay_draws_the_same_masks_every_time():
    x = torch.ones(1000)

    def closure():
        return nn.functional.dropout(x, 0.5).mean() + random.random() + numpy.random.rand()

    again = replay(closure)
    assert again().item() == again().item() == again().item()
    assert evaluate(closure).item() != evaluate(closure).item()


def test_a_random_state_can_be_restored_more_than_once():
    state = RandomState()
    first = torch.rand(3)
    state.restore()
    assert torch.equal(first, torch.rand(3))
    state.restore()
    assert torch.equal(first, torch.rand(3))


def test_inside_eagerly_compiled_code_runs_as_python():
    ran = []

    def forward(x):
        ran.append(1)
        return x * 2

    compiled = torch.compile(forward, backend="eager")
    compiled(torch.ones(2))
    before = len(ran)
    with eagerly():
        for _ in range(3):
            assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
        assert not torch.compiler.is_compiling()
    assert len(ran) == before + 3
