"""torch's own modules and ways of writing a model: each passes, in train mode, with nothing to say."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from clinometer.gradients.check.check_gradients import check_gradients


def vectors(module, *shape):
    return module, lambda: _scalar(module(torch.randn(*shape)))


def _scalar(out):
    if isinstance(out, tuple):
        out = out[0]
    return out.square().mean() + out.sin().sum() / 7


def recurrent(kind):
    return vectors(kind(4, 5, num_layers=2, bidirectional=True), 6, 3, 4)


def attention():
    module = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def loss():
        x = torch.randn(2, 5, 8)
        mask = torch.triu(torch.full((5, 5), float("-inf")), 1)
        return _scalar(module(x, x, x, attn_mask=mask))

    return module, loss


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True)
    return vectors(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 2, 5, 8)


def embedding_bag():
    module = nn.EmbeddingBag(9, 4, mode="max")
    return module, lambda: _scalar(module(torch.randint(0, 9, (3, 5))))


def embedding():
    module = nn.Embedding(9, 4, padding_idx=0)
    return module, lambda: _scalar(module(torch.randint(0, 9, (3, 5))))


def sparse_embedding():
    module = nn.Embedding(9, 4, sparse=True)
    return module, lambda: _scalar(module(torch.randint(0, 9, (3, 5))))


def convolutions():
    return vectors(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.ConvTranspose2d(4, 3, 3, stride=2),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            nn.AdaptiveAvgPool2d(3),
            nn.PReLU(),
        ),
        2,
        2,
        6,
        6,
    )


def spectral():
    return vectors(
        nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(5, 6)), parametrizations.weight_norm(nn.Linear(6, 3))
        ),
        4,
        5,
    )


def orthogonal():
    return vectors(parametrizations.orthogonal(nn.Linear(5, 5)), 4, 5)


def connectionist():
    module = nn.Linear(4, 6)

    def loss():
        log_probs = module(torch.randn(7, 2, 4)).log_softmax(-1)
        targets = torch.tensor([[1, 2, 3], [4, 5, 1]])
        return F.ctc_loss(log_probs, targets, torch.tensor([7, 7]), torch.tensor([3, 2]))

    return module, loss


def functional():
    module = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2))
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    return weights, lambda: _scalar(functional_call(module, weights, (torch.randn(3, 4),)))


def vectorised():
    w = torch.randn(4, 4, requires_grad=True)
    return {"w": w}, lambda: _scalar(vmap(lambda x: (w @ x).tanh())(torch.randn(3, 4)))


def linear_algebra():
    w = (torch.randn(4, 4) + 4 * torch.eye(4)).requires_grad_()

    def loss():
        logdet = torch.linalg.slogdet(w)[1]
        spectrum = torch.fft.rfft(w).abs().square().sum()
        return (
            logdet
            + torch.linalg.solve(w, torch.ones(4)).sum()
            + spectrum / 100
            + torch.linalg.svdvals(w).sum()
        )

    return {"w": w}, loss


def in_place_and_indices():
    w = torch.randn(6, 4, requires_grad=True)

    def loss():
        out = torch.zeros(8, 4)
        out[torch.tensor([0, 2, 3])] = w[:3].exp()
        out = out.index_add(0, torch.tensor([1, 1, 7]), w[3:]).masked_fill(out > 2, 0.5)
        out = out.scatter_add(0, torch.zeros(2, 4, dtype=torch.long), w[:2])
        return (
            _scalar(torch.where(out > 0, out, 0.1 * out))
            + w.quantile(0.3)
            + w.logsumexp(0).sum()
            + w.cummax(0)[0].sum()
        )

    return {"w": w}, loss


def compiled():
    module = torch.compile(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    return vectors(module, 3, 4)


def scripted():
    module = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    return vectors(module, 3, 4)


def parallel():
    return vectors(nn.DataParallel(nn.Sequential(nn.Linear(4, 5), nn.Tanh())), 3, 4)


def low_rank():
    base = nn.Linear(5, 5).requires_grad_(False)
    down, up = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)
    nn.init.zeros_(up.weight)
    x = torch.randn(4, 5)
    return nn.ModuleList([base, down, up]), lambda: _scalar(base(x) + up(down(x)))


def frozen_statistics():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5).eval(), nn.Linear(5, 2))
    return vectors(module, 6, 4)


CASES = {
    "lstm": lambda: recurrent(nn.LSTM),
    "gru": lambda: recurrent(nn.GRU),
    **{
        f.__name__: f
        for f in (
            attention,
            encoder,
            embedding,
            embedding_bag,
            sparse_embedding,
            convolutions,
            spectral,
            orthogonal,
            connectionist,
            functional,
            vectorised,
            linear_algebra,
            in_place_and_indices,
            compiled,
            scripted,
            parallel,
            low_rank,
            frozen_statistics,
        )
    },
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_healthy_model_passes(name):
    torch.manual_seed(0)
    params, loss = CASES[name]()
    check = check_gradients(params, loss)
    assert [f.cause for f in check.findings if f.severity == "fault"] == [], check.render("en")
    statuses = {tensor.status for tensor in check.entries().values()}
    assert statuses <= ({"passed", "unchecked"} if name == "low_rank" else {"passed"}), check.render("en")
    assert all(layer.judgement.verdict != "wrong" for layer in check.layers)


def test_a_layer_whose_parameter_the_forward_puts_in_anew_is_not_accused():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            self.fc.weight = nn.Parameter(self.fc.weight)
            return self.head(torch.tanh(self.fc(x)))

    model, x = Wrapped(), torch.randn(3, 4)
    check = check_gradients(model, lambda: model(x).square().sum())
    assert check.wrong_layers == ()
    assert check.healthy
    assert check["fc.weight"].status == "no-gradient"  # which diagnose traces to the line


class Softmax(nn.Module):
    """Written by hand; its backward leaves out the sum over the row unless `right`."""

    def __init__(self, right):
        super().__init__()
        self.right = right

    def forward(self, scores):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, scores):
                shares = scores.softmax(-1)
                ctx.save_for_backward(shares)
                return shares

            @staticmethod
            def backward(ctx, gradient):
                (shares,) = ctx.saved_tensors
                through = shares * gradient
                return through - shares * through.sum(-1, keepdim=True) if self.right else through

        return Function.apply(scores)


class Masked(nn.Module):
    """Attention in which whole rows of scores are the mask's value, those of the padding."""

    def __init__(self, softmax, share):
        super().__init__()
        self.query, self.key, self.softmax = nn.Linear(6, 6), nn.Linear(6, 6), softmax
        self.share = share

    def forward(self, tokens):
        real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        scores = self.query(tokens) @ self.key(tokens).mT
        pairs = real[:, :, None] & real[:, None, :]
        scores = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min * self.share)
        return self.softmax(scores) @ tokens


@pytest.mark.parametrize("share", [1.0, 0.5, 1e-100])
@pytest.mark.parametrize("right", [True, False, None])
def test_rows_that_are_all_masked_with_the_smallest_number_are_no_wrong_backward(right, share):
    torch.manual_seed(0)
    model = Masked(nn.Softmax(-1) if right is None else Softmax(right), share)
    tokens = torch.randn(2, 5, 6)
    found = check_gradients(model, lambda: model(tokens).square().mean())
    assert found.healthy is (right is not False), found.render()
