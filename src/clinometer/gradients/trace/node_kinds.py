"""Kinds of nodes, by what their backward does to a gradient."""

from __future__ import annotations

from clinometer.gradients.report.formatting import words

RELU = {"Relu", "Threshold", "LeakyRelu", "Prelu", "PreluKernel", "RreluWithNoise"}
SMOOTH = words(
    """
    Gelu Silu Elu Softplus Sigmoid Tanh Hardswish Hardsigmoid Mish LogSigmoid Celu Selu Softmax
    SafeSoftmax LogSoftmax Erf Glu Softshrink Hardshrink Logsumexp Atan
    """
)
CLAMP = words(
    """
    Clamp ClampMin ClampMax Hardtanh Maximum Minimum Fmax Fmin FakeQuantizePerTensorAffineCachemask
    FakeQuantizePerChannelAffineCachemask
    """
)
STEP = {"Round", "Floor", "Ceil", "Sign", "Trunc", "Sgn", "Angle"}
DRAW = {"Bernoulli", "Poisson", "Normal", "Binomial", "SampleDirichlet", "Multinomial"}
MASK = {"MaskedFill", "Where", "MaskedScatter", "MaskedSelect", "IndexFill", "NativeDropout", "FusedDropout"}
PRODUCT = words(
    """
    Mm Addmm Bmm Baddbmm Convolution Linear Mv Dot Addmv ConvolutionOverrideable
    """
)
PICK = words(
    """
    Embedding EmbeddingBag Index IndexSelect Gather Slice Select Narrow TakeAlongDim
    EmbeddingDenseBackward Split SplitWithSizes Unbind Chunk Diagonal AsStrided Take
    """
)
LOSS = words(
    """
    MseLoss L1Loss SmoothL1Loss HuberLoss NllLoss NllLossForward NllLoss2D NllLossNd BinaryCrossEntropy
    BinaryCrossEntropyWithLogits KlDiv MultiMarginLoss MultilabelMarginLoss SoftMarginLoss CtcLoss
    PoissonNllLoss
    """
)
HINGES = words(
    """
    margin_ranking_loss hinge_embedding_loss cosine_embedding_loss triplet_margin_loss mse_loss l1_loss
    triplet_margin_with_distance_loss multi_margin_loss multilabel_margin_loss cross_entropy nll_loss
    smooth_l1_loss huber_loss
    """
)
