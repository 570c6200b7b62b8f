"""Layers beyond the linear one: convolutions, recurrent layers, made weights, experts; each split exactly."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from clinometer.gradients.attribute.attribute import attribute

B, S, D = 2, 5, 4


@pytest.fixture
def x():
    return torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def curved(y):
    return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


def assert_exact(model, closure, names=None):
    """Of every weight: entries, a row and the whole add up to autograd's value, and nothing is unseen."""
    tensors = dict(model.named_parameters())
    found = attribute(model, closure, list(names or tensors))
    grads = dict(zip(tensors, torch.autograd.grad(closure(), list(tensors.values())), strict=True))
    for name in names or tensors:
        one, grad = found[name], grads[name]
        assert one.total == pytest.approx(one.gradient, rel=1e-11, abs=1e-13), name
        assert abs(one.gradient) == pytest.approx(float(grad.norm()), rel=1e-11)
        assert one.complete
        assert not one.unseen
        flat = grad.abs().flatten().argsort()[[-1, grad.numel() // 2]].tolist()
        for index in {tuple(int(i) for i in torch.unravel_index(torch.tensor(f), grad.shape)) for f in flat}:
            entry = attribute(model, closure, name, index)
            assert entry.total == pytest.approx(float(grad[index]), rel=1e-10, abs=1e-13), (name, index)
            assert entry.gradient == pytest.approx(float(grad[index]), rel=1e-10, abs=1e-13)
    return found


def by_position(out, delta, positions, weight, batch_and_space):
    """What each position of `out` adds to the gradient of `weight`, one backward a position."""
    parts = {}
    for at in itertools.product(*map(range, positions)):
        mask = torch.zeros_like(out)
        mask[batch_and_space(at)] = 1.0
        (parts[at],) = torch.autograd.grad((out * delta * mask).sum(), weight, retain_graph=True)
    return parts


CONVOLUTIONS = [
    (nn.Conv1d(D, 6, 3, padding=1), (B, D, S)),
    (nn.Conv1d(D, 6, 3, padding="same", dilation=2, groups=2), (B, D, 9)),
    (nn.Conv1d(D, 6, 2, padding="same"), (B, D, S)),  # one more on the right
    (nn.Conv1d(D, D, 4, groups=D, padding=3), (B, D, S)),  # Mamba's
    (nn.Conv1d(D, 6, 3, padding=1, padding_mode="circular"), (B, D, S)),
    (nn.Conv1d(D, 6, 3, bias=False), (D, 7)),
    (nn.Conv2d(3, D, 2, stride=2), (B, 3, 6, 4)),  # a patch embedding
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (B, 4, 6, 5)),
    (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (1, 2, 3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:50])
def test_a_convolution_is_split_over_its_output_s_positions(layer, shape):
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    closure = lambda: curved(layer(x))  # noqa: E731
    found = assert_exact(layer, closure)["weight"]
    out = layer(x)
    (delta,) = torch.autograd.grad(curved(out), out, retain_graph=True)
    batched = out.dim() == layer.weight.dim()
    positions = (out.shape[0] if batched else 1, *out.shape[2 if batched else 1 :])
    parts = by_position(
        out,
        delta,
        positions,
        layer.weight,
        lambda at: (at[0], slice(None), *at[1:]) if batched else (slice(None), *at[1:]),
    )
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(7), layer.weight.shape))
    matrix = attribute(layer, closure, "weight", index).matrix
    for at, part in parts.items():
        assert matrix[at].item() == pytest.approx(part[index].item(), rel=1e-10, abs=1e-14)
        assert found.norms[at].item() == pytest.approx(part.norm().item(), rel=1e-10, abs=1e-14)
    row = attribute(layer, closure, "weight", 1)
    at = next(iter(parts))
    assert row.norms[at].item() == pytest.approx(parts[at][1].norm().item(), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(D, 6, 3, stride=2, padding=1, output_padding=1), (B, D, S)),
        (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), (B, 4, 3, 4)),
    ],
    ids=str,
)
def test_a_transposed_convolution_is_split_over_its_input_s_positions(layer, shape):
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    closure = lambda: curved(layer(x))  # noqa: E731
    found = assert_exact(layer, closure)["weight"]
    out = layer(x)
    (delta,) = torch.autograd.grad(curved(out), out)
    matrix = attribute(layer, closure, "weight", (1, 2, *(0,) * (layer.weight.dim() - 2))).matrix
    assert matrix.shape == (shape[0], *shape[2:])
    for at in itertools.product(*map(range, matrix.shape)):
        alone = torch.zeros_like(x)
        alone[(at[0], slice(None), *at[1:])] = x[(at[0], slice(None), *at[1:])]
        (part,) = torch.autograd.grad((layer(alone) * delta).sum(), layer.weight)
        assert matrix[at].item() == pytest.approx(
            part[(1, 2, *(0,) * (part.dim() - 2))].item(), rel=1e-10, abs=1e-14
        )
        assert found.norms[at].item() == pytest.approx(part.norm().item(), rel=1e-10, abs=1e-14)


def test_a_convolution_over_tokens_names_them():
    embed, layer = nn.Embedding(9, D), nn.Conv1d(D, 3, 3, padding=2)
    ids = torch.arange(2 * S).view(2, S) % 9
    model = nn.ModuleList([embed, layer])
    found = attribute(model, lambda: curved(layer(embed(ids).mT)[..., :S]), "1.bias", (1,))
    assert found.matrix.shape == (2, S + 2)  # of the convolution's own output: two more than there are tokens
    causal = nn.Conv1d(D, 3, 3)
    model = nn.ModuleList([embed, causal])
    found = attribute(model, lambda: curved(causal(F.pad(embed(ids).mT, (2, 0)))), "1.weight", (1, 2, 0))
    assert {push.text for push in found.top(3)} <= {f"#{i}" for i in range(9)}
    assert found.complete


RECURRENT = [
    nn.LSTM(D, 3, batch_first=True),
    nn.LSTM(D, 3, num_layers=2, bidirectional=True),
    nn.LSTM(D, 5, proj_size=2, batch_first=True, bidirectional=True),
    nn.GRU(D, 3, batch_first=True, bidirectional=True),
    nn.GRU(D, 3, bias=False),
    nn.RNN(D, 3, batch_first=True),
    nn.RNN(D, 3, nonlinearity="relu", num_layers=2),
]


@pytest.mark.parametrize("layer", RECURRENT, ids=str)
def test_a_fused_recurrent_layer_is_split_over_the_sequence(layer, x):
    layer = layer.double()
    found = assert_exact(layer, lambda: curved(layer(x)[0]))
    shape = (B, S)
    for name, one in found.entries().items():
        assert one.matrix.shape == shape, name


@pytest.mark.parametrize("layer", RECURRENT[:4], ids=str)
def test_a_recurrent_layer_computes_what_torch_computes(layer, x):
    from clinometer.gradients.attribute.use_recorder import UseRecorder

    layer = layer.double()
    expected = layer(x)
    with UseRecorder({"w": layer.weight_hh_l0}, {}):
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_each_step_of_a_recurrent_layer_is_at_its_position(x):
    layer = nn.RNN(D, 3, bidirectional=True).double()  # the sequence is first: S positions, B sequences
    given = x.transpose(0, 1)
    found = attribute(layer, lambda: curved(layer(given)[0]), ["weight_hh_l0", "weight_hh_l0_reverse"])
    outs, copies = [], {}
    for suffix, steps in (("", range(S)), ("_reverse", reversed(range(S)))):
        part = {
            n: getattr(layer, f"{n}_l0{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        h, kept = torch.zeros(B, 3, dtype=torch.float64), [None] * S
        for t in steps:
            own = copies[suffix, t] = part["weight_hh"].detach().clone().requires_grad_()
            h = torch.tanh(
                F.linear(given[t], part["weight_ih"], part["bias_ih"]) + F.linear(h, own, part["bias_hh"])
            )
            kept[t] = h
        outs.append(torch.stack(kept))
    curved(torch.cat(outs, -1)).backward()
    for suffix in ("", "_reverse"):
        one = found["weight_hh_l0" + suffix]
        grads = [copies[suffix, t].grad for t in range(S)]
        whole = sum(grads)
        expected = [float((grad * whole).sum() / whole.norm()) for grad in grads]
        assert one.matrix.sum(1).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("cell", [nn.LSTMCell(D, 3), nn.GRUCell(D, 3), nn.RNNCell(D, 3)], ids=str)
def test_a_cell_in_a_loop_is_split_over_the_loop(cell, x):
    cell = cell.double()

    def closure():
        state, outs = None, []
        for t in range(S):
            state = cell(x[:, t], state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return curved(torch.stack(outs))

    found = assert_exact(cell, closure)
    assert found["weight_ih"].matrix.shape == (B, S)


def test_a_packed_sequence_is_told_as_not_seen(x):
    layer = nn.LSTM(D, 3, batch_first=True).double()
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
    found = attribute(layer, lambda: curved(layer(packed)[0].data), "weight_hh_l0", (0, 0))
    assert not found.complete
    assert [op for op, _ in found.unseen] == ["lstm"]
    assert "not seen: lstm" in found.render()


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def made(kind):
    linear = nn.Linear(D, D).double()
    if kind == "weight norm":
        return parametrizations.weight_norm(linear)
    if kind == "spectral norm":
        return parametrizations.spectral_norm(linear)
    if kind == "orthogonal":
        return parametrizations.orthogonal(linear)
    if kind == "symmetric":
        parametrize.register_parametrization(linear, "weight", Symmetric())
        return linear
    return nn.utils.weight_norm(linear)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    "kind", ["weight norm", "spectral norm", "orthogonal", "symmetric", "old weight norm"]
)
def test_a_weight_that_is_made_of_others_is_split_for_each_of_them(kind, x):
    model = made(kind).eval()
    assert_exact(model, lambda: curved(model(x)))


class Made(nn.Module):
    """Scales and gates that are functions of parameters."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, D).double())
        self.log_scale = nn.Parameter(torch.tensor(0.3).double())
        self.gate = nn.Parameter(torch.randn(3).double())
        self.mix = nn.Parameter(torch.randn(2).double())
        self.register_buffer("mask", torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]]).double())

    def forward(self, x):
        y = F.linear(x, self.w * self.mask) * self.log_scale.exp()
        a, b = self.mix.softmax(0).unbind()
        return torch.sigmoid(self.gate) * (a * y + b * y.cos())


def test_a_gate_a_temperature_a_mixture_and_a_pruned_weight_are_split(x):
    model = Made()
    found = assert_exact(model, lambda: curved(model(x)))
    assert found["w"].norms is not None  # entry by entry: exact without an outer product
    for name in ("w", "log_scale", "gate"):
        assert found[name].matrix.shape == (B, S) if found[name].matrix is not None else True


def test_the_norm_through_an_elementwise_function_is_exact(x):
    model = Made()
    closure = lambda: curved(F.linear(x, (2 * model.w).exp()))  # noqa: E731
    found = attribute(model, closure, "w")
    out = F.linear(x, (2 * model.w).exp())
    (delta,) = torch.autograd.grad(curved(out), out)
    each = torch.einsum("bso,bsi->bsoi", delta, x) * 2 * (2 * model.w).exp().detach()
    assert found.norms.flatten().tolist() == pytest.approx(each.flatten(2).norm(dim=-1).flatten().tolist())


@pytest.mark.parametrize(
    "function",
    [
        lambda w: (-w).exp(),
        lambda w: (2 * w).tanh() * 3,
        lambda w: torch.cat([w.exp(), w.sin()]).T[:, :5].T,
        lambda w: w.exp().unbind(0)[1][None] + w[2:],
        lambda w: (w / w.norm(dim=-1, keepdim=True)).T.flip(0).T,
        lambda w: w.softmax(-1).clone().to(torch.float64),
    ],
)
def test_chains_of_functions_scales_and_views_are_followed(function, x):
    model = nn.ParameterDict({"w": torch.randn(3, D).double()})
    found = assert_exact(model, lambda: curved(F.linear(x, function(model["w"]))))["w"]
    assert found.matrix.shape == (B, S)


@pytest.mark.parametrize("equation", ["bsd,df,f->bsf", "bsd,df,bs->bf", "bsd,df,bs->bsf"])
def test_an_einsum_of_three_is_split(equation, x):
    model = nn.ParameterDict({"w": torch.randn(D, 3).double(), "third": torch.randn(3).double()})
    third = model["third"] if equation.split(",")[2].startswith("f") else x[..., 0]
    names = ["w", "third"] if third is model["third"] else ["w"]
    assert_exact(
        nn.ParameterDict({n: model[n] for n in names}),
        lambda: curved(torch.einsum(equation, x, model["w"], third)),
    )


def test_a_penalty_on_the_weights_is_a_term_without_a_position(x):
    model = nn.Linear(D, 3).double()
    closure = lambda: curved(model(x)) + 0.1 * model.weight.square().sum()  # noqa: E731
    found = attribute(model, closure, "weight", (1, 2))
    assert found.complete
    assert [tuple(part.terms.shape) for part in found.uses] == [(B, S), ()]
    assert found.uses[1].terms.item() == pytest.approx(0.2 * model.weight[1, 2].item(), rel=1e-12)


def test_experts_in_one_grouped_product_are_split_by_token():
    torch.manual_seed(0)
    w = torch.randn(3, 16, 8, requires_grad=True)
    x = torch.randn(10, 16)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)  # the second expert gets nobody
    closure = lambda: F.grouped_mm(x, w, offs=ends).sin().sum()  # noqa: E731
    try:
        closure()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no grouped product here: {error}")
    found = attribute({"w": w}, closure, "w", (2, 3, 5))
    (grad,) = torch.autograd.grad(closure(), w)
    assert found.total == pytest.approx(float(grad[2, 3, 5]), rel=1e-5)
    assert found.complete
    assert (found.matrix[:4] == 0).all()
    whole = attribute({"w": w}, closure, "w")
    assert whole.total == pytest.approx(float(grad.norm()), rel=1e-5)
    assert whole.norms.shape == (10,)


def test_gpt2_s_addmm_is_split_by_token():
    from transformers.pytorch_utils import Conv1D

    embed, layer = nn.Embedding(9, D), Conv1D(6, D)
    model = nn.ModuleList([embed, layer]).double()
    ids = torch.arange(B * S).view(B, S) % 9
    found = assert_exact(model, lambda: curved(layer(embed(ids))))
    assert found["1.weight"].matrix.shape == (B, S)


@pytest.mark.parametrize("shape", [(1, S), (S,)])
def test_a_position_embedding_is_split_by_sequence_too(shape):
    tokens, positions = nn.Embedding(9, D), nn.Embedding(S, D)
    model = nn.ModuleDict({"tokens": tokens, "positions": positions}).double()
    ids = torch.arange(B * S).view(B, S) % 9
    where = torch.arange(S).view(shape)
    closure = lambda: curved(tokens(ids) + positions(where))  # noqa: E731
    found = assert_exact(model, closure)["positions.weight"]
    assert found.matrix.shape == (B, S)
    entry = attribute(model, closure, "positions.weight", (3, 1), decode=lambda token: f"<{token}>")
    assert {push.text for push in entry.top()} == {"<3>", "<8>"}
    assert {push.position for push in entry.top()} == {(0, 3), (1, 3)}


def test_a_position_embedding_with_another_use_stays_as_it_was():
    tokens, positions = nn.Embedding(9, D), nn.Embedding(S, D)
    model = nn.ModuleDict({"tokens": tokens, "positions": positions}).double()
    ids = torch.arange(B * S).view(B, S) % 9

    def closure():
        looked = positions(torch.arange(S)[None])
        return curved(tokens(ids) + looked) + looked.square().sum()

    found = attribute(model, closure, "positions.weight", (3, 1))
    assert found.total == pytest.approx(found.gradient, rel=1e-12)
    assert [tuple(part.terms.shape) for part in found.uses] == [(1, S)]


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_embeddings_with_other_gradients_are_split(options):
    embed = nn.Embedding(9, D, **options).double()
    ids = torch.tensor([[1, 2, 2], [4, 1, 1]])
    for row in (1, 2, 4, 5):
        found = attribute(embed, lambda: curved(embed(ids)), "weight", (row, 1))
        assert found.total == pytest.approx(found.gradient, rel=1e-12, abs=1e-15)
        assert not found.unseen
    assert attribute(embed, lambda: curved(embed(ids)), "weight").complete


def test_sequences_of_unequal_length_are_split_over_their_own_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, D), nn.Linear(D, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    ids = torch.nested.nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([4, 1])], layout=torch.jagged)
    closure = lambda: curved(model(ids).values())  # noqa: E731
    found = assert_exact(model, closure)
    assert found["1.weight"].matrix.shape == (5,)
    entry = attribute(model, closure, "1.weight", (1, 2))
    assert {push.text for push in entry.top()} == {"#1", "#2", "#3", "#4"}
    plain = attribute(model, lambda: curved(model(torch.tensor([1, 2, 3, 4, 1]))), "1.weight", (1, 2))
    assert entry.matrix.tolist() == pytest.approx(plain.matrix.tolist(), rel=1e-12)
