"""The layers of torch.nn pass: activations, losses, norms, pooling, embeddings, recurrence and attention.

In float32 and in float64, in train mode; norms in eval mode too. What torch computes with a constant of few
digits (hardsigmoid) is said to be an approximation of torch's, with its relative error.
`test_no_layer_of_torch_is_forgotten` compares the list with torch.nn.
"""

import pytest
import torch
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients

NEW = torch.randn


def scalar(out):
    return ((out[0] if isinstance(out, tuple) else out) * 1.3).sin().mean()


def on(shape, kind, *args, **options):
    """The layer on a parameter of this shape."""

    def build():
        layer, w = getattr(nn, kind)(*args, **options), nn.Parameter(NEW(*shape))
        return {"w": w, **dict(layer.named_parameters())}, lambda: scalar(layer(w))

    return kind, build


def evaluated(shape, kind, *args, **options):
    def build():
        layer, w = getattr(nn, kind)(*args, **options).eval(), nn.Parameter(NEW(*shape))
        return {"w": w, **dict(layer.named_parameters())}, lambda: scalar(layer(w))

    return f"{kind} in eval mode", build


def loss(name, f):
    """A loss of five rows of six numbers that a layer gives."""

    def build():
        layer, x = nn.Linear(6, 6), NEW(5, 6)
        targets = {
            "y": NEW(5, 6),
            "ids": torch.randint(0, 6, (5,)),
            "signs": torch.where(torch.rand(5, 6) > 0.5, 1.0, -1.0),
        }
        return layer, lambda: f(layer(x), **targets)

    return name, build


def lookup(name, layer):
    def build():
        made, ids = layer(), torch.randint(0, 9, (3, 5))
        return made, lambda: scalar(made(ids))

    return name, build


def two_inputs(name, layer, *shapes):
    def build():
        made, inputs = layer(), [NEW(*shape) for shape in shapes]
        return made, lambda: scalar(made(*inputs))

    return name, build


def adaptive_softmax():
    first, last = nn.Linear(6, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10])
    x, targets = NEW(7, 6), torch.tensor([0, 3, 6, 9, 12, 15, 19])
    return nn.ModuleList([first, last]), lambda: last(first(x), targets).loss


def linear_cross_entropy():
    layer, x, ids = nn.LinearCrossEntropyLoss(6, 5), NEW(4, 6), torch.randint(0, 5, (4,))
    return layer, lambda: layer(x, ids)


ACTIVATIONS = [
    *(
        "ELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardtanh",
        "Hardswish",
        "LeakyReLU",
        "LogSigmoid",
        "PReLU",
        "ReLU",
    ),
    *("ReLU6", "RReLU", "SELU", "CELU", "GELU", "Sigmoid", "SiLU", "Mish", "Softplus", "Softshrink"),
    *("Softsign", "Tanh", "Tanhshrink", "GLU"),
]
NORMS = {
    "BatchNorm1d": ((5, 6), 6),
    "BatchNorm2d": ((3, 2, 4, 4), 2),
    "BatchNorm3d": ((2, 2, 3, 3, 3), 2),
    "InstanceNorm1d": ((3, 2, 5), 2),
    "InstanceNorm2d": ((3, 2, 4, 4), 2),
    "InstanceNorm3d": ((2, 2, 3, 3, 3), 2),
    "LayerNorm": ((5, 6), 6),
    "RMSNorm": ((5, 6), 6),
    "GroupNorm": ((3, 4, 5), 2, 4),
    "LocalResponseNorm": ((3, 4, 5), 2),
    "CrossMapLRN2d": ((3, 4, 5, 5), 2),
}
SIZES = {1: (2, 3, 5), 2: (2, 3, 5, 5), 3: (2, 3, 5, 5, 5)}
POOLS = [
    f"{kind}{d}d" for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool") for d in SIZES
]

BUILDERS = dict(
    [
        *(on((5, 6), kind) for kind in ACTIVATIONS),
        *(on((5, 6), kind, 1) for kind in ("Softmin", "Softmax", "LogSoftmax")),
        on((5, 6), "Threshold", 0.1, 20.0),
        on((2, 3, 4, 4), "Softmax2d"),
        *(on(shape, kind, *args) for kind, (shape, *args) in NORMS.items()),
        *(evaluated(shape, kind, *args) for kind, (shape, *args) in NORMS.items()),
        *(on(SIZES[int(kind[-2])], kind, 2) for kind in POOLS),
        *(on(SIZES[d], f"LPPool{d}d", 2, 2) for d in SIZES),
        *(on(SIZES[d], f"FractionalMaxPool{d}d", 2, output_ratio=0.6) for d in (2, 3)),
        *(on((2, 3, 5, 5), kind, 1) for kind in ("ReflectionPad2d", "ReplicationPad2d", "CircularPad2d")),
        on((2, 3, 4, 4), "Upsample", scale_factor=2, mode="bicubic"),
        on((2, 4, 3, 3), "PixelShuffle", 2),
        on((2, 1, 4, 4), "PixelUnshuffle", 2),
        on((2, 4, 3, 3), "ChannelShuffle", 2),
        on((2, 8, 9), "Fold", (4, 4), 2),
        on((2, 3, 4, 4), "Unfold", 2),
        *(on((5, 6, 2, 2, 2)[: 2 + d], f"Dropout{d}d" if d else "Dropout", 0.5) for d in (0, 1, 2, 3)),
        on((5, 6), "AlphaDropout", 0.5),
        on((5, 6, 2, 2), "FeatureAlphaDropout", 0.5),
        on((2, 3, 5), "Conv1d", 3, 4, 2, padding="same", padding_mode="circular"),
        on((2, 3, 5, 5), "Conv2d", 3, 4, 3, stride=2, padding=1),
        on((1, 2, 3, 3, 3), "Conv3d", 2, 2, 2),
        on((2, 3, 5), "ConvTranspose1d", 3, 4, 2, stride=2),
        on((2, 3, 5, 5), "ConvTranspose2d", 3, 4, 3, dilation=2),
        on((1, 2, 3, 3, 3), "ConvTranspose3d", 2, 2, 2),
        on((5, 6), "Linear", 6, 3),
        on((3, 2, 4), "RNN", 4, 5, 2, nonlinearity="relu", dropout=0.2),
        on((3, 2, 4), "LSTM", 4, 6, proj_size=3),
        on((3, 2, 4), "GRU", 4, 5, bidirectional=True),
        *(on((2, 4), kind, 4, 5) for kind in ("RNNCell", "LSTMCell", "GRUCell")),
        on((2, 4, 8), "TransformerEncoderLayer", 8, 2, 12, batch_first=True),
        two_inputs(
            "TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(8, 2, 12), (4, 2, 8), (3, 2, 8)
        ),
        two_inputs("Transformer", lambda: nn.Transformer(8, 2, 1, 1, 12), (4, 2, 8), (3, 2, 8)),
        two_inputs("MultiheadAttention", lambda: nn.MultiheadAttention(8, 2), *[(4, 2, 8)] * 3),
        two_inputs(
            "MultiheadAttention with options",
            lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, dropout=0.2),
            *[(4, 2, 8)] * 3,
        ),
        two_inputs("Bilinear", lambda: nn.Bilinear(4, 5, 3), (2, 4), (2, 5)),
        lookup("Embedding", lambda: nn.Embedding(9, 4)),
        lookup("Embedding with a maximal norm", lambda: nn.Embedding(9, 4, max_norm=1.0)),
        lookup("Embedding with padding", lambda: nn.Embedding(9, 4, padding_idx=0)),
        lookup("EmbeddingBag", lambda: nn.EmbeddingBag(9, 4, mode="sum")),
        lookup("EmbeddingBag of means", lambda: nn.EmbeddingBag(9, 4, mode="mean")),
        lookup("EmbeddingBag of maxima", lambda: nn.EmbeddingBag(9, 4, mode="max")),
        ("AdaptiveLogSoftmaxWithLoss", adaptive_softmax),
        loss("L1Loss", lambda o, y, **_: nn.L1Loss()(o, y)),
        loss("MSELoss", lambda o, y, **_: nn.MSELoss()(o, y)),
        loss("SmoothL1Loss", lambda o, y, **_: nn.SmoothL1Loss(beta=0.5)(o, y)),
        loss("HuberLoss", lambda o, y, **_: nn.HuberLoss(delta=0.7)(o, y)),
        loss("CrossEntropyLoss", lambda o, ids, **_: nn.CrossEntropyLoss(label_smoothing=0.1)(o, ids)),
        loss("CrossEntropyLoss of shares", lambda o, y, **_: nn.CrossEntropyLoss()(o, y.softmax(1))),
        loss("NLLLoss", lambda o, ids, **_: nn.NLLLoss()(o.log_softmax(1), ids)),
        loss("PoissonNLLLoss", lambda o, y, **_: nn.PoissonNLLLoss(full=True)(o, y.abs() + 0.2)),
        loss("GaussianNLLLoss", lambda o, y, **_: nn.GaussianNLLLoss()(o, y, o.exp())),
        loss("KLDivLoss", lambda o, y, **_: nn.KLDivLoss(reduction="sum")(o.log_softmax(1), y.softmax(1))),
        loss("BCELoss", lambda o, signs, **_: nn.BCELoss()(o.sigmoid(), (signs + 1) / 2)),
        loss("BCEWithLogitsLoss", lambda o, signs, **_: nn.BCEWithLogitsLoss()(o, (signs + 1) / 2)),
        loss(
            "MarginRankingLoss",
            lambda o, signs, **_: nn.MarginRankingLoss(0.3)(o[:, 0], o[:, 1], signs[:, 0]),
        ),
        loss("HingeEmbeddingLoss", lambda o, signs, **_: nn.HingeEmbeddingLoss()(o, signs)),
        loss("SoftMarginLoss", lambda o, signs, **_: nn.SoftMarginLoss()(o, signs)),
        loss(
            "MultiLabelSoftMarginLoss",
            lambda o, signs, **_: nn.MultiLabelSoftMarginLoss()(o, (signs + 1) / 2),
        ),
        loss(
            "MultiLabelMarginLoss",
            lambda o, **_: nn.MultiLabelMarginLoss()(o, torch.tensor([[1, 3, -1, 0, 0, 0]] * 5)),
        ),
        loss("MultiMarginLoss", lambda o, ids, **_: nn.MultiMarginLoss()(o, ids)),
        loss(
            "CosineEmbeddingLoss",
            lambda o, y, signs, **_: nn.CosineEmbeddingLoss(0.2)(o, y, signs[:, 0]),
        ),
        loss("TripletMarginLoss", lambda o, y, **_: nn.TripletMarginLoss()(o, y, y.flip(0))),
        loss(
            "TripletMarginWithDistanceLoss",
            lambda o, y, **_: nn.TripletMarginWithDistanceLoss()(o, y, y.flip(0)),
        ),
        loss(
            "CTCLoss",
            lambda o, **_: nn.CTCLoss()(
                o.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])
            ),
        ),
        *(
            [("LinearCrossEntropyLoss", linear_cross_entropy)]
            if hasattr(nn, "LinearCrossEntropyLoss")
            else []
        ),
        loss("CosineSimilarity", lambda o, y, **_: nn.CosineSimilarity()(o, y).mean()),
        loss("PairwiseDistance", lambda o, y, **_: nn.PairwiseDistance()(o, y).mean()),
    ]
)
ROOMS = ("activation", "loss", "normalization", "batchnorm", "instancenorm", "pooling", "sparse", "rnn")
NOT_LISTED = {
    "RNNBase",
    "RNNCellBase",
    "SyncBatchNorm",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "NLLLoss2d",
}
"""Bases; one that needs several processes; unpooling, which needs a pooling's indices; an old name."""
SAID = {
    "Hardsigmoid": {"approximate"},
    "CrossMapLRN2d": {"approximate"},
    "CrossMapLRN2d in eval mode": {"approximate"},
    "Embedding with a maximal norm": {"unclear", "kink"},
}
"""CrossMapLRN2d of an even size is off by 4e-4 in torch; rows at the maximal norm stand on a corner."""
NOT_PROVED = SAID.keys() - {"Hardsigmoid"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_layer_of_torch_passes(name, dtype):
    torch.manual_seed(1)
    torch.set_default_dtype(dtype)
    try:
        params, closure = BUILDERS[name]()
        check = check_gradients(params, closure)
    finally:
        torch.set_default_dtype(torch.float32)
    assert check.healthy, check.render("en")
    assert check.passed or name in NOT_PROVED, check.render("en")
    causes = {finding.cause for finding in check.findings} - {"corner"}
    assert causes <= SAID.get(name, set()), check.render("en")


def test_no_layer_of_torch_is_forgotten():
    listed = {name.split()[0] for name in BUILDERS}
    rooms = [getattr(nn.modules, room) for room in ROOMS]
    there = {name for room in rooms for name in getattr(room, "__all__", ())}
    lazy = {name for name in there if name.startswith(("Lazy", "_"))}
    assert there - listed - lazy - NOT_LISTED == set()
