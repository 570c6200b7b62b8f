"""Whatever diagnose finds, nothing is left behind: no value, no grad, no hook, no patch."""

import pytest
import torch
from tests.gradients.diagnose.planted import cut_paths, loops, no_gradient, not_finite, zero_gradient
from torch import nn
from torch.nn.modules import module as module_hooks

from clinometer.gradients.diagnose.diagnose import diagnose

PLANTED = [
    *cut_paths.FAULTS[::4],
    *no_gradient.FAULTS[::3],
    *zero_gradient.FAULTS[::4],
    *not_finite.FAULTS[::4],
    *loops.FAULTS,
]


def patched_places():
    return (
        torch.autograd.Function.__dict__["apply"],
        nn.Parameter.__dict__["__new__"],
        torch.inference_mode.__dict__["__enter__"],
        torch.inference_mode.__dict__["__exit__"],
        dict(module_hooks._global_forward_hooks),
        dict(module_hooks._global_forward_pre_hooks),
        torch.overrides._get_current_function_mode_stack(),
        torch.is_grad_enabled(),
    )


def bits(tensors):
    return {
        name: (t.detach().clone(), None if t.grad is None else t.grad.clone(), t.requires_grad, t._version)
        for name, t in tensors.items()
        if t.is_leaf
    }


def same(before, after):
    for name, (value, grad, requires_grad, version) in before.items():
        now = after[name]
        assert torch.equal(value.nan_to_num(), now[0].nan_to_num()), name
        assert (grad is None) == (now[1] is None), name
        assert grad is None or torch.equal(grad, now[1]), name
        assert (requires_grad, version) == now[2:], name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_nothing_is_left_behind(planted):
    params, closure, *rest = planted.build()
    optimizer = rest[0] if rest else None
    tensors = dict(params.named_parameters()) if isinstance(params, nn.Module) else dict(params)
    before, places, random = bits(tensors), patched_places(), torch.get_rng_state()
    state = {} if optimizer is None else {k: dict(v) for k, v in optimizer.state.items()}
    diagnose(params, closure, optimizer=optimizer)
    same(before, bits(tensors))
    assert patched_places() == places
    assert torch.equal(random, torch.get_rng_state())
    assert state == ({} if optimizer is None else {k: dict(v) for k, v in optimizer.state.items()})


class Stop(BaseException):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_nothing_is_left_behind_when_something_is_raised(where, error):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            if where == "forward":
                raise error
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise error

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before, places = bits(dict(model.named_parameters())), patched_places()
    running = model[1].running_mean.clone()
    with pytest.raises(error):
        diagnose(model, lambda: Fails.apply(model(torch.randn(3, 4))).sum())
    same(before, bits(dict(model.named_parameters())))
    assert patched_places() == places
    assert torch.equal(running, model[1].running_mean)


def test_a_graph_the_user_holds_has_no_hooks_afterwards():
    model = nn.Linear(4, 1)
    loss = model(torch.ones(2, 4)).square().mean()
    diagnose(model, lambda: loss)
    seen = []
    loss.grad_fn.register_hook(lambda into, out: seen.append(len(into)))
    loss.backward()
    assert seen == [1]


def test_the_optimizers_hooks_do_not_see_the_trial_step():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    diagnose(model, lambda: model(torch.ones(2, 4)).square().mean(), optimizer=optimizer)
    assert not calls
    assert not optimizer.state


def test_a_diagnosis_keeps_neither_model_nor_graph_alive():
    import gc
    import weakref

    model = nn.Linear(4, 1)
    alive = weakref.ref(model.weight)
    found = diagnose(model, lambda m=model: m(torch.ones(2, 4)).detach().mean() + m.bias.sum())
    del model
    gc.collect()
    assert alive() is None
    assert found["weight"].cause == "cut"
