"""explain_step(): optimizers that are what they claim to be, and optimizers that are not."""

import math

import pytest
import torch
from torch import nn

from clinometer.gradients.step.explain_step import explain_step
from clinometer.optim.adamw import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}


class Tampered(torch.optim.AdamW):
    """AdamW written out, with one thing wrong."""

    eps_inside = corrected = decay_after = coupled = None
    rate = 1.0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (b1, b2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
                s["step"] += 1
                t = s["step"].item()
                g = p.grad + decay * p if self.coupled else p.grad
                if not self.coupled and not self.decay_after:
                    p.mul_(1 - lr * decay)
                s["exp_avg"].mul_(b1).add_(g, alpha=1 - b1)
                s["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
                c1, c2 = (1 - b1**t, 1 - b2**t) if self.corrected is not False else (1, 1)
                v = s["exp_avg_sq"] / c2
                denominator = (v + eps).sqrt() if self.eps_inside else v.sqrt() + eps
                p.sub_(self.rate * lr / c1 * s["exp_avg"] / denominator)
                if self.decay_after:
                    p.mul_(1 - lr * decay)


def anatomy_of(cls, dtype=torch.float32, steps=3, **options):
    params = {"a": nn.Parameter(torch.randn(6, 5).to(dtype)), "b": nn.Parameter(torch.randn(7).to(dtype))}
    optimizer = cls(list(params.values()), **{**OPTIONS, **options})
    for _ in range(steps):
        for p in params.values():
            p.grad = (0.01 * torch.randn(p.shape)).to(dtype)
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
    return anatomy


def test_written_out_by_hand_it_is_adamw():
    anatomy = anatomy_of(Tampered)
    assert anatomy.faithful is True
    assert anatomy.measures.worst_ulp <= 4
    assert "✗" not in anatomy.render("en")


@pytest.mark.parametrize(
    ("fault", "slip", "words"),
    [
        ({"eps_inside": True}, "eps-inside", "ε inside the root"),
        ({"corrected": False}, "uncorrected", "without bias correction"),
        ({"rate": 1.01}, "factor", "1.010 times"),
        ({"rate": -1.0}, "factor", "−1.000 times"),
        ({"coupled": True}, "coupled", "decay is added to the gradient"),
        ({"decay_after": True}, "decay-after", "decays after the update"),
    ],
)
def test_a_tampered_adamw_is_not_what_it_claims_and_the_slip_is_named(fault, slip, words):
    anatomy = anatomy_of(type("AdamW", (Tampered,), fault))
    assert anatomy.faithful is False
    assert anatomy.measures.missed > 30
    assert anatomy.measures.worst_ulp > 4
    assert anatomy["a"].slip[0] == slip
    text = anatomy.render("en")
    assert "AdamW does not follow its formula in 2 tensors." in text
    assert words in " ".join(text.split())
    worst = anatomy["a"][anatomy["a"].measures.worst_index]
    assert worst.faithful is False
    assert "✗ AdamW does not follow its formula" in worst.render("en")
    assert "没有按它的公式更新" in worst.render("zh")


def test_a_rate_wrong_by_a_percent_is_seen_from_zero_weights_too():
    p = nn.Parameter(torch.zeros(40))
    optimizer = type("AdamW", (Tampered,), {"rate": 1.01})([p], **OPTIONS)
    p.grad = torch.randn(40)
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    assert anatomy.measures.missed == 40
    assert anatomy["p"].slip == ("factor", pytest.approx(1.01, rel=1e-4))


def test_an_unrelated_fault_is_reported_without_a_guess():
    class Shuffled(Tampered):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.data = p.data.flip(0)

    # A step of its own may do something else on purpose: the difference is a note, and no accusation.
    anatomy = anatomy_of(Shuffled)
    assert anatomy.faithful is False
    assert anatomy["a"].slip is None
    assert "✗" not in anatomy.render("en")
    assert "Shuffled descends from torch's AdamW and has a step of its own" in " ".join(
        anatomy.render("en").split()
    )


def test_one_wrong_entry_of_many_is_found():
    class OneWrong(torch.optim.AdamW):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                p = self.param_groups[0]["params"][0]
                p[3, 2] = p[3, 2] * (1 + 2e-6)

    anatomy = anatomy_of(OneWrong)
    assert anatomy.measures.missed == 1
    assert anatomy["a"].measures.worst_index == (3, 2)
    assert anatomy["a"][3, 2].faithful is False
    assert anatomy["a"][3, 1].faithful is True


def test_torchs_fused_sgd_is_wrong_in_bfloat16_on_the_cpu_and_the_anatomy_says_so():
    # Not planted: torch 2.13's own kernel. A float32 tensor beside it is right.
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(torch.randn(64, 33).to(dtype))
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
        for _ in range(3):
            p.grad = torch.randn(64, 33).to(dtype)
            with explain_step(optimizer, {"p": p}) as anatomy:
                optimizer.step()
        found[dtype] = anatomy.faithful
    assert found[torch.float32] is True
    if found[torch.bfloat16]:
        pytest.skip("this torch has repaired its kernel")
    assert found[torch.bfloat16] is False


def test_a_hand_written_class_of_that_name_is_held_to_the_form_it_follows():
    class ByHand(torch.optim.Optimizer):
        def __init__(self, params, lr, betas, eps, weight_decay):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                (b1, b2), lr = group["betas"], group["lr"]
                for p in group["params"]:
                    s = self.state[p]
                    t = s.get("t", 0) + 1
                    m = b1 * s.get("m", 0) + (1 - b1) * p.grad
                    v = b2 * s.get("v", 0) + (1 - b2) * p.grad**2
                    rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
                    p.sub_(rate * m / (v.sqrt() + group["eps"]))
                    p.sub_(lr * group["weight_decay"] * p)
                    s.update(t=t, m=m, v=v)

    by_hand = type("AdamW", (ByHand,), {})
    anatomy = anatomy_of(by_hand)
    assert anatomy.to_dict()["formula"] == "adamw-after"
    assert anatomy.faithful is True
    assert anatomy["a"][0, 0].step == 3
    assert anatomy_of(ByHand).faithful is True  # whatever its name


class SignSGD(torch.optim.Optimizer):
    """Steps by the sign of the gradient; the class has a formula of nobody's."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.param_groups[0]["lr"] * p.grad.sign())


@pytest.mark.parametrize("name", ["SignSGD", "SGD", "AdamW", "Muon"])
def test_of_an_unknown_optimizer_only_what_moved_is_said_whatever_its_name(name):
    cls = type(name, (SignSGD,), {})
    p = nn.Parameter(torch.randn(6, 5))
    optimizer = cls([p], lr=1e-2)
    p.grad = torch.randn(6, 5)
    before = p.detach().clone()
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    change = p.detach() - before
    measures = anatomy["p"].measures
    cosine = nn.functional.cosine_similarity(change.flatten(), -p.grad.flatten(), 0).item()
    assert anatomy.faithful is None
    assert measures.cosine == pytest.approx(cosine, rel=1e-5)
    assert measures.rms_update == pytest.approx(change.square().mean().sqrt().item(), rel=1e-5)
    assert "momentum_share" not in anatomy["p"].to_dict()
    assert f"The formula of {cls.__name__} is not known here" in anatomy.render("en")
    one = anatomy["p"][2, 3]
    assert one.quantities == {}
    assert one.change == pytest.approx(change[2, 3].item(), rel=1e-6)
    assert one.faithful is None


def test_both_forms_of_adamw_are_told_apart():
    p = nn.Parameter(torch.randn(50))
    optimizer = AdamW([p], **OPTIONS)
    optimizer.__class__ = type("AdamW", (AdamW,), {"formula": "adamw"})  # claims the other form
    for _ in range(2):
        p.grad = 1e-3 * torch.randn(50)
        with explain_step(optimizer, {"p": p}) as anatomy:
            optimizer.step()
    assert anatomy.faithful is False
    assert anatomy["p"].slip[0] == "adamw-after"


def own(step, **defaults):
    """An optimizer of nobody's, with this step of one tensor: (p, group, state) → None."""

    class Own(torch.optim.Optimizer):
        def __init__(self, params, **options):
            super().__init__(params, {"lr": 1e-2, **defaults, **options})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        step(p, group, self.state[p])

    return Own


def test_a_trust_ratio_in_a_subclass_of_adam_is_no_accusation():
    class Lamb(torch.optim.Adam):
        @torch.no_grad()
        def step(self, closure=None):
            before = [p.detach().clone() for p in self.param_groups[0]["params"]]
            super().step()
            for p, old in zip(self.param_groups[0]["params"], before, strict=True):
                change = p - old
                p.copy_(old + change * old.norm() / change.norm() * 1e-2)

    anatomy = anatomy_of(Lamb, weight_decay=0.0)
    assert "✗" not in anatomy.render("en")
    assert "✗" not in anatomy["a"][0, 0].render("en")


def test_a_rank_one_adam_by_hand_whose_count_is_that_of_the_next_step_is_recognised():
    def adam(p, group, state):
        (b1, b2), t = group["betas"], state.get("t", 1)
        m = b1 * state.get("m", 0) + (1 - b1) * p.grad
        v = b2 * state.get("v", 0) + (1 - b2) * p.grad**2
        p.sub_(group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + group["eps"]))
        p.sub_(group["lr"] * group["weight_decay"] * p)
        state.update(t=t + 1, m=m, v=v)

    anatomy = anatomy_of(own(adam), **OPTIONS)
    assert anatomy.to_dict()["formula"] == "adamw-after"
    assert anatomy.faithful is True
    assert "✗" not in anatomy.render("en")


def test_a_count_that_does_not_advance_is_a_fault_though_each_step_fits():
    def adam(p, group, state):
        (b1, b2), state["step"] = group["betas"], 0
        m = b1 * state.get("exp_avg", 0) + (1 - b1) * p.grad
        v = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * p.grad**2
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] / (1 - b1) * m / ((v / (1 - b2)).sqrt() + group["eps"]))
        state.update(exp_avg=m, exp_avg_sq=v)

    anatomy = anatomy_of(own(adam), **OPTIONS)
    assert anatomy.to_dict()["count_not_advanced"] == ["a", "b"]
    assert "✗ The step count of a, b does not advance by one" in anatomy.render("en")
    assert anatomy_of(torch.optim.AdamW).to_dict()["count_not_advanced"] == []


def half(eps, name=torch.float16):
    p = nn.Parameter(torch.randn(40).to(name))
    optimizer = torch.optim.Adam([p], lr=1e-3, eps=eps)
    p.grad = torch.randn(40).to(name)
    p.grad[3] = 0
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    return anatomy


def test_an_eps_that_is_zero_in_float16_is_the_steps_fault_and_the_formula_is_kept():
    anatomy = half(1e-8)
    assert anatomy.faithful is True
    assert anatomy.made_nonfinite["p"].variant == "eps"
    assert anatomy.made_nonfinite["p"].index == (3,)
    text = " ".join(anatomy.render("en").split())
    assert "✗ The step itself made" in text
    assert "ε = 1e-08 is 0 in float16" in text
    assert "does not follow" not in text
    assert "这一步本身使" in anatomy.render("zh")
    assert "ε = 1e-08 is 0 in float16" in " ".join(anatomy["p"][3].render("en").split())


@pytest.mark.parametrize(
    ("eps", "dtype"), [(1e-4, torch.float16), (1e-8, torch.bfloat16), (1e-8, torch.float32)]
)
def test_an_eps_that_the_dtype_can_hold_is_no_fault(eps, dtype):
    assert not half(eps, dtype).made_nonfinite
    assert "✗" not in half(eps, dtype).render("en")


@pytest.mark.parametrize(
    ("step", "variant"),
    [
        (lambda p, group, state: p.sub_(group["lr"] * p.grad / p.grad.norm()), "zero_gradient"),
        (lambda p, group, state: p.sub_(group["lr"] * p.grad / p.grad.abs()), "zero_gradient"),
        (lambda p, group, state: p.sub_((p - 1e9).sqrt()), ""),
    ],
)
def test_what_a_step_makes_nan_of_finite_numbers_is_the_steps(step, variant):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = own(step)([p, q])
    p.grad, q.grad = torch.zeros(3), torch.ones(4)
    with explain_step(optimizer, {"p": p, "q": q}) as anatomy:
        optimizer.step()
    assert anatomy.made_nonfinite["p"].variant == variant
    assert ("q" in anatomy.made_nonfinite) == (variant == "")
    assert "diagnose(params, closure) says" not in anatomy["p"][0].render("en")


def test_a_state_that_was_not_finite_before_is_named():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["exp_avg"][1] = float("nan")
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    assert anatomy.made_nonfinite["p"].variant == "state"
    assert "exp_avg in the optimizer's state was not finite" in " ".join(anatomy.render("en").split())


def test_parameters_over_one_memory_are_named_and_the_optimizer_is_not_accused():
    p = nn.Parameter(torch.randn(4, 3))
    q = nn.Parameter(torch.zeros(4, 3))
    q.data = p.data
    optimizer = torch.optim.AdamW([p, q], lr=1e-2)
    p.grad, q.grad = torch.randn(4, 3), torch.randn(4, 3)
    with explain_step(optimizer, {"p": p, "q": q}) as anatomy:
        optimizer.step()
    text = " ".join(anatomy.render("en").split())
    assert "p and q are two parameters over the same memory" in text
    assert "does not follow" not in text
    assert anatomy.faithful is None


def test_neighbours_in_one_buffer_share_no_memory():
    flat = torch.randn(24)
    params = {"p": nn.Parameter(flat[:12].view(4, 3)), "q": nn.Parameter(flat[12:].view(4, 3))}
    params |= {"even": nn.Parameter(torch.randn(6)[::2])}
    columns = torch.randn(5, 4)
    params |= {"left": nn.Parameter(columns[:, :2]), "right": nn.Parameter(columns[:, 2:])}
    optimizer = torch.optim.SGD(list(params.values()), lr=0.1)
    for p in params.values():
        p.grad = torch.ones_like(p)
    with explain_step(optimizer, params) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True
    assert anatomy.to_dict()["shared_memory"] == []


def test_no_reason_is_given_that_was_not_measured():
    p = nn.Parameter(torch.ones(3))
    noise = own(lambda p, group, state: p.add_(0.1))([p])
    p.grad = torch.zeros(3)
    with explain_step(noise, {"p": p}) as anatomy:
        noise.step()
    text = anatomy["p"][0].render("en")
    assert "decay" not in text
    assert "earlier batches" not in text.lower()
    p.grad = torch.zeros(3)
    decaying = torch.optim.SGD([p], lr=0.1, weight_decay=0.1)
    with explain_step(decaying, {"p": p}) as anatomy:
        decaying.step()
    assert "Weight decay moves it." in anatomy["p"][0].render("en")


def test_what_a_hook_writes_after_the_step_is_not_the_steps():
    p = nn.Parameter(torch.randn(5, 4))
    optimizer = torch.optim.AdamW([p], lr=1e-2)

    @torch.no_grad()
    def normalise(*_):
        p.div_(p.norm(dim=1, keepdim=True))

    optimizer.register_step_post_hook(normalise)
    p.grad = torch.randn(5, 4)
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True
    assert not torch.equal(anatomy["p"].moved.after, p)
