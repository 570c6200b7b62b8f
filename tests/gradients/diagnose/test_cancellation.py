"""Parts of order one whose sum is zero, or of rounding size, are a cancellation: its line is named.

The principle: within a node the terms are measured; where paths meet they are compared with their sum. It is
a fault unless the gradient is another at other values (a minimum, a reference with the same values), or the
construction needs it (a bias before a normalisation, a key's bias, a weight that is normalised). A small
gradient that is true is never called rounding.
"""

import copy

import pytest
import torch
from tests.gradients.diagnose.test_constant import mlp, only_fault, x
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from clinometer.gradients.diagnose.diagnose import diagnose

ADVANTAGES = torch.randn(16, generator=torch.Generator().manual_seed(2))
ACTIONS = torch.randint(4, (16,), generator=torch.Generator().manual_seed(3))


def policy_loss(policy, detach):
    logp = Categorical(logits=policy(x())).log_prob(ACTIONS)
    old = Categorical(logits=policy(x())).log_prob(ACTIONS)
    old = old.detach() if detach else old
    ratio = (logp - old).exp()  # the ratio
    return -torch.min(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES).mean()


def test_a_ratio_of_a_policy_to_itself_is_a_fault_at_the_subtraction():
    policy = mlp(4)
    fault = only_fault(diagnose(policy, lambda: policy_loss(policy, False)), "cancellation", "paths")
    assert len(fault.names) == 4
    assert fault.where.source.startswith("ratio = (logp - old).exp()")
    assert fault.values["size"] <= 1e-6 * fault.values["term"]
    assert "detach" in fault.say("remedy", "en")
    assert not diagnose(policy, lambda: policy_loss(policy, True)).findings


def test_it_is_one_too_beside_a_value_that_trains_the_layer_below():
    model = nn.ModuleDict({"body": nn.Linear(6, 16), "policy": nn.Linear(16, 4), "value": nn.Linear(16, 1)})

    def loss():
        h = model["body"](x()).tanh()
        chosen = model["policy"](h).softmax(-1).gather(1, ACTIONS[:, None])
        again = model["policy"](model["body"](x()).tanh()).softmax(-1).gather(1, ACTIONS[:, None])
        return -(ADVANTAGES[:, None] * chosen / again).mean() + (model["value"](h) - 1).square().mean()

    fault = only_fault(diagnose(model, loss), "cancellation", "paths")
    assert set(fault.names) == {"policy.weight", "policy.bias"}


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.BatchNorm1d(8)]
)
def test_the_sum_over_what_is_normalised_is_a_fault_at_the_normalisation(norm):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), norm)

    def loss():
        h = model(x())
        return h.sum()  # the reader

    fault = only_fault(diagnose(model, loss), "cancellation", "elsewhere")
    assert {"0.weight", "0.bias", "2.weight"} <= set(fault.names)
    assert fault.where.source == "h = model(x())"
    assert fault.values["term"] > 1e4 * fault.values["size"] > 0
    assert f"{fault.values['term']:.1e}" in fault.say("why", "en")
    assert "what sum makes of the result (test_cancellation.py:" in fault.say("why", "en")
    assert diagnose(model, lambda: model(x()).square().mul(torch.arange(8.0)).mean()).healthy


def standardised(h):
    h = (h - h.mean(0)) / h.std(0)
    return h.sum()


CONSTANTS = {
    "softmax": lambda h: h.softmax(-1).sum(),
    "log_softmax, logsumexp": lambda h: h.log_softmax(-1).logsumexp(-1).mean(),
    "divided by its sum": lambda h: (h.exp() / h.exp().sum(-1, keepdim=True)).sum(-1).mean(),
    "normalised, squared": lambda h: F.normalize(h, dim=-1).square().sum(-1).mean(),
    "normalised, its norm": lambda h: F.normalize(h, dim=-1).norm(dim=-1).mean(),
    "rms_norm, squared": lambda h: F.rms_norm(h, (4,), eps=1e-12).square().mean(),
    "cosine with itself": lambda h: 1 - F.cosine_similarity(h, h).mean(),
    "cosine with itself, detached": lambda h: 1 - F.cosine_similarity(h, h.detach()).mean(),
    "less itself": lambda h: (h - h).mean(),
    "divided by itself": lambda h: (h / h).mean(),
    "standardised by hand": standardised,
    "kl of itself": lambda h: kl_divergence(Categorical(logits=h), Categorical(logits=h)).mean(),
    "kl of itself, detached": lambda h: F.kl_div(
        h.log_softmax(-1), h.softmax(-1).detach(), reduction="batchmean"
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_is_constant_by_cancellation_is_a_fault(name):
    model = mlp(4)
    found = diagnose(model, lambda: CONSTANTS[name](model(x())))
    (fault,) = [f for f in found.findings if f.severity == "fault"]
    assert fault.cause == "cancellation", found.render("en")
    assert set(fault.names) == set(found)
    assert fault.values["size"] <= 1e-5 * fault.values["term"]


def test_a_group_of_one_number_is_a_fault_at_the_group_norm():
    model = nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(4, 4), nn.Linear(4, 1))
    (fault,) = [
        f for f in diagnose(model, lambda: model(x()).square().mean()).findings if f.severity == "fault"
    ]
    assert fault.cause in ("cancellation", "constant")  # up to rounding, or exactly
    assert fault.where.op == "group_norm"
    assert {"0.weight", "0.bias"} <= set(fault.names)


def test_a_router_whose_one_weight_is_divided_by_itself_is_a_fault():
    model = nn.ModuleDict(
        {"router": nn.Linear(6, 4), "experts": nn.ModuleList(nn.Linear(6, 1) for _ in range(4))}
    )

    def loss():
        weight, chosen = model["router"](x()).softmax(-1).topk(1, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.stack([expert(x()) for expert in model["experts"]], 1)
        return (out.gather(1, chosen[:, :, None])[:, 0] * weight - 1).square().mean()

    fault = only_fault(diagnose(model, loss), "cancellation", "paths")
    assert set(fault.names) == {"router.weight", "router.bias"}
    assert fault.where.source == "weight = weight / weight.sum(-1, keepdim=True)"


def attention(values):
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "v")})
    model["places"] = nn.Embedding(5, 8)

    def loss():
        places = model["places"].weight
        inputs = torch.zeros_like(places) if values == "zero" else places
        scores = model["q"](places) @ model["k"](places).T
        return (scores.softmax(-1) @ model["v"](inputs) + places - 1).square().mean()

    return model, loss


def reference_with_the_same_values(distance):
    model = mlp(4)
    reference = copy.deepcopy(model).requires_grad_(False)
    return model, lambda: distance(model(x()), reference(x()))


def experts_with_the_same_values():
    expert = nn.Linear(6, 4)
    model = nn.ModuleDict({"router": nn.Linear(6, 3), "head": nn.Linear(4, 1)})
    model["experts"] = nn.ModuleList(copy.deepcopy(expert) for _ in range(3))

    def loss():
        weights = model["router"](x()).softmax(-1)
        out = torch.stack([expert(x()) for expert in model["experts"]], 1)
        return (model["head"]((weights[:, :, None] * out).sum(1).tanh()) - 1).square().mean()

    return model, loss


def weight_norm_of_one_input():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(1, 8))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1))
    return model, lambda: (model(x()[:, :1]) - 1).square().mean()


def scaled(loss_of):
    model = mlp(4)
    return model, lambda: loss_of(model(x()))


def critic():
    model = mlp(1, nn.LeakyReLU)
    return model, lambda: model(x()).mean() - model(x() + 1).mean()


def gradient_penalty():
    model = mlp(1, nn.ReLU)

    def loss():
        inputs = x().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return (slope.norm(dim=-1) - 1).square().mean()

    return model, loss


HEALTHY = {
    "the bias of a difference": critic,
    "the biases of a slope": gradient_penalty,
    "a key's bias": lambda: attention("embedded"),
    "attention to equal values": lambda: attention("zero"),
    "kl of a reference": lambda: reference_with_the_same_values(
        lambda h, r: F.kl_div(h.log_softmax(-1), r.softmax(-1), reduction="batchmean")
    ),
    "cosine of a reference": lambda: reference_with_the_same_values(
        lambda h, r: 1 - F.cosine_similarity(h, r).mean()
    ),
    "experts that are copies": experts_with_the_same_values,
    "weight_norm of one input": weight_norm_of_one_input,
    "small": lambda: scaled(lambda h: (h - 1).square().mean() * 1e-12),
    "small beside a constant": lambda: scaled(lambda h: h.softmax(-1).sum() + 1e-3 * (h - 1).square().mean()),
    "small behind a softmax": lambda: scaled(lambda h: (1e-6 * h).softmax(-1)[:, 0].mean()),
    "nearly constant": lambda: scaled(lambda h: (h.softmax(-1) * torch.tensor([1.0, 1.0, 1.0, 1.001])).sum()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_small_or_needed_or_passes_is_no_fault(name):
    model, loss = HEALTHY[name]()
    found = diagnose(model, loss)
    assert found.healthy, found.render("en")
    if name.startswith(("small", "nearly")):
        assert not found.findings, found.render("en")


def test_a_hook_that_takes_the_gradient_is_not_called_a_cancellation():
    model = mlp(4)

    def loss():
        h = model[0](x())
        h.register_hook(torch.zeros_like)
        return model[2](h.tanh() * h).square().mean()

    assert "cancellation" not in {f.cause for f in diagnose(model, loss).findings}
