"""attribute(): the terms of every kind of use add up to autograd's gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clinometer.gradients.attribute.attribute import attribute
from clinometer.messages import InputError

B, S, D = 2, 5, 4


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def curved(y):
    """A scalar with another gradient at every entry."""
    return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()


x = data(B, S, D)
experts = data(3, 7, D)
rows = torch.tensor([[0, 3, 3, 1, 5], [5, 5, 2, 0, 3]])
mixed = data(12, 12)

USES = {
    "linear": ((6, D), lambda w: F.linear(x, w)),
    "matmul": ((D, 6), lambda w: x @ w),
    "matmul-first": ((6, S), lambda w: w @ x),
    "transposed": ((6, D), lambda w: x @ w.t()),
    "mT": ((6, D), lambda w: torch.matmul(x, w.mT)),
    "mm": ((D, 6), lambda w: torch.mm(x.flatten(0, 1), w)),
    "mv": ((6, D), lambda w: w @ x[0, 0]),
    "vector": ((D,), lambda w: x @ w),
    "unbatched": ((6, D), lambda w: F.linear(x[0, 0], w)),
    "addmm": ((D, 6), lambda w: torch.addmm(data(6), x.flatten(0, 1), w, alpha=0.5)),
    "addmm-bias": ((6,), lambda w: torch.addmm(w, x.flatten(0, 1), data(D, 6), beta=3)),
    "baddbmm": ((3, D, 6), lambda w: torch.baddbmm(data(3, 7, 6), experts, w)),
    "bmm": ((3, D, 6), lambda w: torch.bmm(experts, w)),
    "broadcast": ((D, 6), lambda w: data(3, B, S, D) @ w),
    "einsum": ((6, D), lambda w: torch.einsum("bsd,fd->bsf", x, w)),
    "einsum-first": ((6, D), lambda w: torch.einsum("fd,...d->...f", w, x)),
    "einsum-implicit": ((D, 6), lambda w: torch.einsum("bsd,df", x, w)),
    "einsum-heads": ((2, 3, D), lambda w: torch.einsum("bsd,hkd->bhsk", x, w)),
    "einsum-experts": ((3, D, 6), lambda w: torch.einsum("etd,edf->etf", experts, w)),
    "embedding": ((6, D), lambda w: F.embedding(rows, w)),
    "embedding-padding": ((6, D), lambda w: F.embedding(rows, w, padding_idx=3)),
    "indexing": ((6, D), lambda w: w[rows]),
    "bias": ((6,), lambda w: F.linear(x, data(6, D), w)),
    "added": ((D,), lambda w: x + w),
    "subtracted": ((D,), lambda w: x - w),
    "position": ((1, S, D), lambda w: x + w),
    "position-of-one": ((1, S, D), lambda w: x[:1] + w),
    "position-slice": ((8, D), lambda w: x + w[:S]),
    "layer-norm": ((D,), lambda w: F.layer_norm(x, (D,), w, None)),
    "layer-norm-bias": ((D,), lambda w: F.layer_norm(x, (D,), data(D), w)),
    "rms-norm": ((D,), lambda w: F.rms_norm(x, (D,), w)),
    "scale": ((D,), lambda w: w * x),
    "scale-offset": ((D,), lambda w: x * (1.0 + w)),
    "per-position-scale": ((S, 1), lambda w: x * w),
    "scalar": ((), lambda w: x * w),
    "divided": ((6, D), lambda w: F.linear(x, -w / 3)),
    "chunk": ((18, D), lambda w: F.linear(x, w.chunk(3)[1])),
    "chunks": ((18, D), lambda w: sum(F.linear(x, part) * (i + 1) for i, part in enumerate(w.split(6)))),
    "unbind": ((3, 6, D), lambda w: F.linear(x, w.unbind(0)[2])),
    "view": ((24,), lambda w: F.linear(x, w.view(6, D))),
    "permute": ((D, 3, 2), lambda w: F.linear(x, w.permute(2, 1, 0).reshape(6, D))),
    "cast": ((6, D), lambda w: F.linear(x.float(), w.float()).double()),
    "clone": ((6, D), lambda w: F.linear(x, w.clone().contiguous())),
    "repeat": ((3, D), lambda w: F.linear(x, w.repeat(2, 1))),
    "tied-rows": ((3, D), lambda w: F.linear(x, torch.cat([w, w]))),
    "lora": ((6, D), lambda w: F.linear(x, w + data(6, 2) @ data(2, D))),
    "two-uses": ((D, D), lambda w: F.linear(F.linear(x, w).tanh(), w)),
    "use-and-transpose": ((6, D), lambda w: F.linear(F.linear(x, w).tanh(), w.t())),
    "tied-embedding": ((6, D), lambda w: F.linear(F.embedding(rows, w).tanh(), w)),
    "aten": ((6, D), lambda w: torch.ops.aten.linear(x, w)),
}
FLOAT32 = {"cast"}


def entries_of(shape):
    index = tuple(size // 2 for size in shape)
    return [index, tuple(0 for _ in shape), tuple(size - 1 for size in shape)]


@pytest.mark.parametrize("name", list(USES))
def test_the_terms_of_one_weight_add_up_to_its_gradient(name):
    shape, use = USES[name]
    w = leaf(*shape)
    state = torch.get_rng_state()

    def closure():
        torch.set_rng_state(state)
        return curved(use(w))

    (expected,) = torch.autograd.grad(closure(), w)
    for index in entries_of(shape):
        found = attribute({"w": w}, closure, "w", index)
        assert found.single
        assert found.gradient == expected[index].item()
        scale = max(sum(u.terms.abs().sum().item() for u in found.uses), 1e-300)
        assert abs(found.remainder) <= (1e-5 if name in FLOAT32 else 1e-12) * scale
        assert found.complete
        assert found.unseen == []
        assert found.uses
    nonzero = [i for i in entries_of(shape) if expected[i] != 0]
    assert nonzero


@pytest.mark.parametrize("name", list(USES))
def test_the_parts_of_a_whole_tensor_add_up_to_its_length_and_norms_are_those_of_outer_products(name):
    shape, use = USES[name]
    w = leaf(*shape)
    state = torch.get_rng_state()

    def closure():
        torch.set_rng_state(state)
        return curved(use(w))

    (expected,) = torch.autograd.grad(closure(), w)
    if not shape:
        return
    found = attribute({"w": w}, closure, {"w": None})["w"]
    assert found.gradient == pytest.approx(expected.norm().item(), rel=1e-12)
    tolerance = 1e-5 if name in FLOAT32 else 1e-12
    assert abs(found.remainder) <= tolerance * found.gradient
    assert found.complete
    row = attribute({"w": w}, closure, "w", 1 % shape[0])
    if len(shape) > 1:
        assert row.gradient == pytest.approx(expected[1 % shape[0]].norm().item(), rel=1e-10, abs=1e-14)
        assert abs(row.remainder) <= tolerance * max(row.gradient, 1e-300)
    # Entry by entry, each position's terms are its contribution; their norm must be what `norms` says.
    flat = [tuple(i) for i in torch.ones(shape).nonzero().tolist()]
    every = [attribute({"w": w}, closure, "w", index) for index in flat]
    if found.matrix is None or not all(e.matrix is not None for e in every):
        return
    each = torch.stack([e.matrix for e in every])
    along = (each * expected.reshape(-1, *[1] * (each.dim() - 1))).sum(0) / expected.norm()
    torch.testing.assert_close(found.matrix, along, rtol=tolerance * 100, atol=tolerance)
    norms = each.square().sum(0).sqrt()
    if found.norms_exact and name not in ("repeat", "tied-rows"):
        torch.testing.assert_close(found.norms, norms, rtol=tolerance * 100, atol=max(tolerance, 1e-10))
    else:
        assert bool((found.norms >= norms - 1e-9).all()) or name in ("repeat", "tied-rows")


def test_the_norm_of_a_linear_weights_share_is_the_product_of_two_norms():
    w, targets = leaf(6, D), data(B, S, 6)
    kept = {}

    def closure():
        y = F.linear(x, w)
        y.register_hook(lambda g: kept.update(delta=g))
        return (y - targets).pow(4).sum()

    found = attribute({"w": w}, closure, "w")
    outer = torch.einsum("bso,bsi->bsoi", kept["delta"], x)
    torch.testing.assert_close(found.norms, outer.flatten(2).norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.norms, kept["delta"].norm(dim=-1) * x.norm(dim=-1), rtol=1e-12, atol=0)
    assert found.norms_exact


def test_the_matrix_holds_delta_times_x_at_every_position():
    w = leaf(6, D)
    kept = {}

    def closure():
        y = F.linear(x, w)
        y.register_hook(lambda g: kept.update(delta=g))
        return curved(y)

    matrix = attribute({"w": w}, closure, "w", (4, 1)).matrix
    torch.testing.assert_close(matrix, kept["delta"][..., 4] * x[..., 1], rtol=1e-13, atol=0)


def test_a_weight_reused_in_a_loop_has_a_position_for_each_step():
    w, u = leaf(D, D), leaf(D, D)

    def closure():
        h = torch.zeros(B, D, dtype=torch.float64)
        for t in range(S):
            h = torch.tanh(F.linear(h, w) + F.linear(x[:, t], u))
        return curved(h)

    grad = torch.autograd.grad(closure(), [w, u])
    for name, expected in zip("wu", grad, strict=True):
        found = attribute({"w": w, "u": u}, closure, name, (1, 2))
        assert found.matrix.shape == (B, S)
        assert found.matrix.sum().item() == pytest.approx(expected[1, 2].item(), rel=1e-12)
        assert found.complete
    whole = attribute({"w": w, "u": u}, closure, "w")
    assert abs(whole.remainder) <= 1e-12 * whole.gradient
    assert whole.norms.shape == (B, S)
    assert torch.equal(whole.matrix[:, 0], torch.zeros(B, dtype=torch.float64))  # h starts at zero


@pytest.mark.parametrize(
    ("module", "run"),
    [
        (nn.Bilinear(D, D, 3), lambda m: m(x, x)),
        (nn.PReLU(), lambda m: m(x)),
    ],
)
def test_what_is_not_seen_is_the_remainder_and_is_named(module, run):
    module = module.double()
    name = next(iter(dict(module.named_parameters())))
    found = attribute(
        module, lambda: curved(run(module)), name, (0,) * dict(module.named_parameters())[name].dim()
    )
    assert found.uses == []
    assert found.remainder == found.gradient != 0
    assert not found.complete
    assert found.unseen[0][0] in ("bilinear", "prelu")
    text = found.render("en", 80)
    assert "comes from uses that were not seen" in text
    assert "test_attribution.py:" in text
    assert "没有看到" in found.render("zh")


def test_one_seen_use_beside_an_unseen_one_leaves_just_the_unseen_part():
    w = leaf(6, D)

    def closure(penalty=0.25):
        return curved(F.linear(x, w)) + penalty * torch.einsum("ij,ij->", w, w)

    found = attribute({"w": w}, closure, "w", (4, 1))
    assert found.remainder == pytest.approx(0.5 * w[4, 1].item(), rel=1e-10)
    assert [op for op, _ in found.unseen] == ["einsum"]
    assert not found.complete


def test_a_custom_function_leaves_an_honest_remainder():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return 2 * t

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    w = leaf(6, D)
    found = attribute({"w": w}, lambda: curved(F.linear(x, Double.apply(w))), "w", (4, 1))
    assert found.remainder == found.gradient != 0
    assert not found.complete


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    first, second = nn.Linear(D, 6).double(), nn.Linear(6, 3).double()
    both = nn.Sequential(first, second)
    given = x.clone().requires_grad_()

    def closure(through):
        return curved(through(lambda z: second(first(z).tanh())))

    plain = lambda: closure(lambda f: f(given))  # noqa: E731
    saving = lambda: closure(lambda f: checkpoint(f, given, use_reentrant=reentrant))  # noqa: E731
    for name, index in (("0.weight", (3, 2)), ("1.bias", 1), ("1.weight", None)):
        a, b = attribute(both, plain, name, index), attribute(both, saving, name, index)
        assert b.complete
        torch.testing.assert_close(a.matrix, b.matrix, rtol=1e-12, atol=1e-14)
        assert abs(b.remainder) <= 1e-12 * abs(b.gradient) + 1e-15


def test_a_compiled_model_is_attributed_as_the_model_it_was_made_from():
    model = nn.Linear(D, 6).double()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    a = attribute(model, lambda: curved(model(x)), "weight", (2, 3))
    b = attribute(compiled, lambda: curved(compiled(x)), "weight", (2, 3))
    assert torch.equal(a.matrix, b.matrix)
    assert b.complete


@pytest.mark.parametrize("transposed", [False, True])
def test_under_autocast_the_terms_add_up_within_bfloat16(transposed):
    model = nn.Linear(64, 32)
    given = torch.randn(8, 16, 64)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            y = given @ model.weight.t() + model.bias if transposed else model(given)
        return curved(y.float())

    for name, index in (("weight", (3, 5)), ("bias", 3), ("weight", None)):
        found = attribute(model, closure, name, index)
        assert found.complete
        assert name == "bias" or found.uses[0].precision == torch.bfloat16
        # autograd rounds its own sum to bfloat16, 8 bits; the terms are exact for what went in.
        assert abs(found.remainder) <= 2**-7 * sum(u.terms.abs().sum().item() for u in found.uses) / 8


def test_float32_terms_add_up_within_rounding():
    w = torch.randn(64, 128, requires_grad=True)
    given = torch.randn(8, 64, 128)
    found = attribute({"w": w}, lambda: curved(F.linear(given, w)), "w", (3, 5))
    assert found.complete
    assert 0 < abs(found.remainder) <= 1e-6 * found.matrix.abs().sum().item()


def test_attention_of_torch_is_seen_inside():
    attention = nn.MultiheadAttention(D, 2, batch_first=True).double()
    for closure in (
        lambda: curved(attention(x, x, x)[0]),
        lambda: curved(attention(x, x + 1, x + 2)[0]),
    ):
        found = attribute(attention, closure, [n for n, _ in attention.named_parameters()])
        for name in found:
            assert abs(found[name].remainder) <= 1e-12 * found[name].gradient
            assert found[name].norms_exact


def test_the_fused_loss_of_a_large_vocabulary_is_taken_apart():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no fused loss")
    w, targets = leaf(11, D), torch.randint(0, 11, (B * S,))
    found = attribute({"w": w}, lambda: F.linear_cross_entropy(x.flatten(0, 1), w, targets), "w", (4, 1))
    assert found.complete
    assert found.matrix.numel() == B * S
    assert abs(found.remainder) <= 1e-12 * found.matrix.abs().sum().item()


def test_a_use_that_does_not_reach_the_loss_adds_nothing():
    w = leaf(6, D)

    def closure():
        _unused = F.linear(x, w).sum()
        with torch.no_grad():
            _untracked = F.linear(x, w)
        return curved(F.linear(x, w))

    found = attribute({"w": w}, closure, "w", (1, 1))
    assert len(found.uses) == 1
    assert found.complete


def test_a_copy_through_which_no_gradient_comes_back_is_no_use_of_the_weight():
    w = leaf(6, D)

    def closure():
        with torch.no_grad():
            frozen = w.clone().t()
        still = torch.cat([w.detach(), w.data])
        return curved(F.linear(x, w)) + curved((w * x[0, 0]) @ frozen) + curved(F.linear(x, still) * w[0, 0])

    found = attribute({"w": w}, closure, "w", (4, 1))
    assert [use.op for use in found.uses][:1] == ["linear"]
    assert len([use for use in found.uses if use.op == "linear"]) == 1


def test_wrong_uses_are_refused_with_a_remedy():
    w, frozen = leaf(6, D), torch.ones(3)
    params = {"w": w, "frozen": frozen, "idle": leaf(2)}
    closure = lambda: curved(F.linear(x, w))  # noqa: E731
    with pytest.raises(InputError, match="frozen has no gradient"):
        attribute(params, closure, "frozen")
    with pytest.raises(InputError, match="idle has no gradient"):
        attribute(params, closure, "idle", 1)
    with pytest.raises(InputError, match=r"shape \[6, 4\]"):
        attribute(params, closure, "w", (6, 0))
    with pytest.raises(KeyError, match="nearest name"):
        attribute(params, closure, "v", 0)
    with pytest.raises(InputError, match="No name"):
        attribute(params, closure, [])
    with pytest.raises(InputError, match="no gradient at all"):
        attribute(params, lambda: torch.tensor(1.0), "w")
    assert attribute(params, closure, "w", (-1, -1)).index == (5, 3)


def test_a_gradient_that_is_exactly_zero_has_zero_terms():
    w = leaf(6, D)
    found = attribute({"w": w}, lambda: (F.linear(x, w) * 0).sum(), "w")
    assert found.gradient == 0
    assert found.complete
    assert found.top() == []
    assert found.matrix.abs().sum() == 0
