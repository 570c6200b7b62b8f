"""The formulas: each optimizer's float64 replay against the real step, entry by entry."""

import copy
import itertools

import pytest
import torch

from clinometer.gradients.step.explain_step import explain_step
from clinometer.gradients.step.formulas import FORMULAS, claim_of
from clinometer.gradients.step.measures import ulp
from clinometer.optim.adamw import AdamW
from clinometer.optim.sgd import SGD

ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
VARIANTS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "sgd-ours": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, ADAM),
    "adam-amsgrad": (torch.optim.Adam, {**ADAM, "amsgrad": True}),
    "adam-maximize": (torch.optim.Adam, {**ADAM, "maximize": True}),
    "adam-decoupled": (torch.optim.Adam, {**ADAM, "decoupled_weight_decay": True}),
    "adamw": (torch.optim.AdamW, ADAM),
    "adamw-amsgrad": (torch.optim.AdamW, {**ADAM, "amsgrad": True}),
    "adamw-maximize": (torch.optim.AdamW, {**ADAM, "maximize": True}),
    "adamw-tensor-lr": (torch.optim.AdamW, {**ADAM, "lr": torch.tensor(1e-2), "foreach": False}),
    "adamw-ours": (AdamW, ADAM),
    "adamw-ours-reference": (AdamW, {**ADAM, "fused": False}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2}),
    "rmsprop-centred": (
        torch.optim.RMSprop,
        {"lr": 1e-2, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True},
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "adagrad-decay": (
        torch.optim.Adagrad,
        {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    ),
    "adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "adamax": (torch.optim.Adamax, {"weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1}),
    "nadam-decoupled": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"weight_decay": 0.1}),
    "radam-decoupled": (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "asgd": (torch.optim.ASGD, {"weight_decay": 0.1, "t0": 3, "lambd": 0.01}),
    "rprop": (torch.optim.Rprop, {"lr": 1e-2, "maximize": True}),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
    "muon": (torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.1}),
    "muon-plain": (torch.optim.Muon, {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
}
HOW = ({}, {"foreach": True}, {"foreach": False}, {"fused": True})
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def cases():
    for (name, (cls, options)), dtype in itertools.product(VARIANTS.items(), DTYPES):
        torchs = cls.__module__.startswith("torch") and cls is not torch.optim.Muon
        for how in HOW if torchs else ({},):
            if "foreach" in how and "foreach" in options:
                continue
            half_sgd = cls is torch.optim.SGD and how.get("fused") and dtype is torch.bfloat16
            if how.get("fused") and cls not in FUSED:
                continue
            if not half_sgd and not (how.get("fused") and "foreach" in options):
                label = next(iter(how), "default") + str(next(iter(how.values()), ""))
                yield pytest.param(cls, {**options, **how}, dtype, id=f"{name}-{label}-{str(dtype)[6:]}")


def parameters(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 5), (4, 7), (3, 3)]
    return {
        f"w{i}": torch.nn.Parameter((scale * torch.randn(s, generator=generator)).to(dtype))
        for i, s in enumerate(shapes)
    }


def give_gradients(params, generator, size=1.0):
    for p in params.values():
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.dtype)


@pytest.mark.parametrize(("cls", "options", "dtype"), list(cases()))
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_twenty_steps_are_replayed_within_four_ulp(cls, options, dtype, scale):
    params, generator = parameters(dtype, scale), torch.Generator().manual_seed(1)
    optimizer = cls(list(params.values()), **options)
    worst = 0.0
    for _ in range(20):
        give_gradients(params, generator)
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
        assert anatomy.faithful is True, anatomy.render("en")
        for name, p in params.items():
            assert anatomy[name].measures.numbers == p.numel()
            worst = max(worst, anatomy[name].measures.worst_ulp)
    assert worst <= 4.0


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("scale", [0.02, 0.0])
def test_a_million_weights_raise_no_false_alarm(how, scale):
    # The tail of the roundings: 5.1 ulp of the update itself, where a weight starts at zero.
    p = torch.nn.Parameter(scale * torch.randn(1000, 1000))
    optimizer = torch.optim.AdamW([p], lr=1e-3, **how)
    for _ in range(3):
        p.grad = 1e-3 * torch.randn(1000, 1000) * 10 ** torch.randn(1000, 1000)
        with explain_step(optimizer, {"p": p}) as anatomy:
            optimizer.step()
        assert anatomy.faithful is True
        assert 0.5 < anatomy.measures.worst_ulp < 2.5


@pytest.mark.parametrize("name", ["adam", "adamw", "adamw-amsgrad", "adamw-ours", "sgd-nesterov", "muon"])
def test_the_state_that_the_replay_gives_is_the_state_the_optimizer_holds(name):
    cls, options = VARIANTS[name]
    params, generator = parameters(torch.float64), torch.Generator().manual_seed(1)
    optimizer = cls(list(params.values()), **options)
    keys = {
        "momentum": ("exp_avg", "momentum_buffer"),
        "scale": ("exp_avg_sq",),
        "largest": ("max_exp_avg_sq",),
    }
    compared = 0
    for _ in range(3):
        give_gradients(params, generator)
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
        for key, p in params.items():
            replay = anatomy[key].moved.replay(FORMULAS[anatomy[key].formula])
            for quantity in replay.quantities:
                for state in keys.get(quantity.key, ()):
                    if state in optimizer.state[p]:
                        held = optimizer.state[p][state]
                        held = held.sqrt() if quantity.key in ("scale", "largest") else held
                        torch.testing.assert_close(quantity.after, held, rtol=1e-13, atol=1e-16)
                        compared += 1
    assert compared >= 9


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "adamw-tensor-lr"])
def test_the_parts_of_a_step_add_up_to_the_step(name):
    cls, options = VARIANTS[name]
    params, generator = parameters(torch.float64), torch.Generator().manual_seed(1)
    optimizer = cls(list(params.values()), **options)
    for _ in range(4):
        give_gradients(params, generator)
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
    moved = anatomy["w0"].moved
    replay = moved.replay(FORMULAS[anatomy["w0"].formula])
    change = moved.after - moved.before
    torch.testing.assert_close(replay.update + replay.decay, change, rtol=1e-12, atol=1e-15)
    if name.startswith("muon"):  # the parts are those of the matrix that is made orthogonal
        assert (replay.momentum + replay.fresh).norm() > 0
    else:
        torch.testing.assert_close(replay.momentum + replay.fresh, replay.update, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "name", ["adam", "adamw", "adamw-ours", "sgd-momentum", "sgd-nesterov", "sgd-dampening"]
)
def test_the_fresh_part_is_what_the_step_loses_when_the_numerator_forgets_this_batch(name):
    # By finite differences of the formula in g, with the denominator held: the parts mean what they say.
    cls, options = VARIANTS[name]
    options = {**options, "weight_decay": 0.0}
    params, generator = parameters(torch.float64), torch.Generator().manual_seed(1)
    optimizer = cls(list(params.values()), **options)
    for _ in range(3):
        give_gradients(params, generator)
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
    moved = anatomy["w0"].moved
    function = FORMULAS[anatomy["w0"].formula]
    replay = function(moved.held)
    state = {
        k: torch.zeros_like(v) if k in ("exp_avg", "momentum_buffer") else v
        for k, v in moved.held.state.items()
    }
    without = function(
        copy.replace(moved.held, state=state) if hasattr(copy, "replace") else _with(moved.held, state)
    )
    torch.testing.assert_close(without.update, replay.fresh, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(replay.update - without.update, replay.momentum, rtol=1e-10, atol=1e-14)


def _with(held, state):
    return type(held)(held.theta, held.grad, state, held.options)


def test_bias_corrections_and_the_rate_are_those_of_the_formula():
    params, generator = parameters(torch.float64), torch.Generator().manual_seed(1)
    optimizer = AdamW(list(params.values()), **ADAM)
    for t in range(1, 4):
        give_gradients(params, generator)
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
        numbers = anatomy["w0"][0, 0].to_dict()["numbers"]
        assert numbers["t"] == t
        assert numbers["bias_correction1"] == pytest.approx(1 - 0.9**t, rel=1e-14)
        assert numbers["bias_correction2"] == pytest.approx(1 - 0.99**t, rel=1e-14)
        assert numbers["lr_t"] == pytest.approx(1e-2 * (1 - 0.99**t) ** 0.5 / (1 - 0.9**t), rel=1e-14)


def test_complex_parameters_are_replayed_as_pairs():
    p = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    optimizer = torch.optim.AdamW([p], lr=1e-2)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        with explain_step(optimizer, {"p": p}) as anatomy:
            optimizer.step()
    assert anatomy.faithful is True
    assert 0 < anatomy["p"].measures.worst_ulp <= 4


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how", [{"capturable": True}, {"capturable": True, "foreach": True}, {"fused": True}]
)
def test_capturable_and_fused_steps_on_a_gpu_are_replayed_within_four_ulp(how):
    p = torch.nn.Parameter(torch.randn(64, 33, device="cuda"))
    optimizer = torch.optim.AdamW([p], **ADAM, **how)
    for _ in range(20):
        p.grad = torch.randn_like(p)
        with explain_step(optimizer, {"p": p}) as anatomy:
            optimizer.step()
        assert anatomy.faithful is True
        assert anatomy["p"].measures.worst_ulp <= 4


def test_differentiable_steps_are_replayed():
    p = torch.randn(5, 3, requires_grad=True).clone()  # torch asks for a tensor that is no leaf
    p.retain_grad()
    p.pow(3).sum().backward()
    optimizer = torch.optim.AdamW([p], **ADAM, differentiable=True)
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True
    assert 0 < anatomy["p"].measures.worst_ulp <= 4


def test_an_lr_in_a_coarser_tensor_sets_the_precision_of_the_step():
    p = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=torch.tensor(1e-2), foreach=False)
    p.grad = torch.randn_like(p)
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    assert anatomy["p"].moved.precision == torch.float32
    assert anatomy.faithful is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_ulp_is_the_distance_to_the_next_number(dtype):
    x = torch.randn(200).to(dtype).abs()
    x = x[x > 0]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    following = (x.view(bits) + 1).view(dtype)
    assert torch.equal(ulp(x.double(), dtype), following.double() - x.double())


@pytest.mark.parametrize("cls", [c for c in vars(torch.optim).values() if isinstance(c, type)])
def test_each_class_of_torch_has_its_formula_or_is_known_to_have_none(cls):
    if not issubclass(cls, torch.optim.Optimizer) or cls is torch.optim.Optimizer:
        return
    claim = claim_of(cls([torch.nn.Parameter(torch.ones(2, 2))], lr=1e-3))
    assert claim.basis == "torch"
    if cls in (torch.optim.LBFGS, torch.optim.SparseAdam):
        assert claim.formulas == ()
    else:
        assert claim.formulas == (cls.__name__.lower(),)


# The sweep over torch.optim: gradients from 1 to below what float16 can square, exact zeros among them.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "adamw-tensor-lr"])
def test_no_optimizer_of_torch_is_accused_in_any_precision(name, dtype):
    cls, options = VARIANTS[name]
    options = {**options, **({"eps": 1e-4} if "eps" in options else {})}
    steps = 0
    for how, size in itertools.product(({"foreach": True}, {"foreach": False}), (1.0, 1e-4)):
        if cls in (AdamW, SGD, torch.optim.Muon) and how["foreach"]:
            continue
        params, generator = parameters(dtype), torch.Generator().manual_seed(1)
        optimizer = cls(
            list(params.values()),
            **(
                {**options, **how}
                if cls.__module__.startswith("torch") and cls is not torch.optim.Muon
                else options
            ),
        )
        for _ in range(5):
            give_gradients(params, generator, size)
            for p in params.values():
                p.grad[0, 0] = 0
            with explain_step(optimizer, params) as anatomy:
                optimizer.step()
            assert anatomy.faithful is True, anatomy.render("en")
            assert "does not follow" not in anatomy.render("en")
            steps += 1
            if anatomy.made_nonfinite:  # a default ε is 0 in float16
                break
    assert steps > 1


def test_a_claim_is_read_off_an_attribute_and_the_identity_of_the_class_never_off_a_name():
    p = [torch.nn.Parameter(torch.ones(2, 2))]

    class Child(torch.optim.AdamW):
        pass

    class OwnStep(torch.optim.AdamW):
        def step(self, closure=None):
            pass

    class Stated(torch.optim.Optimizer):
        formula = "adamw-after"

    def known(optimizer):
        claim = claim_of(optimizer)
        return claim.basis, claim.formulas[:1], claim.is_held_to

    assert known(AdamW(p)) == ("stated", ("adamw-after",), True)
    assert known(SGD(p)) == ("stated", ("sgd",), True)
    assert known(Child(p)) == ("torch", ("adamw",), True)
    assert known(OwnStep(p)) == ("descent", ("adamw",), False)
    assert known(Stated(p, {})) == ("stated", ("adamw-after",), True)
    named = type("AdamW", (torch.optim.Optimizer,), {})
    assert known(named(p, {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}))[::2] == ("fit", False)
    assert "adamw" not in claim_of(named(p, {"lr": 1e-3})).formulas
