"""Figures of a run: plain Plotly dicts with one line that describes a healthy one.

    from clinometer.record.read.reader import RunFile
    from clinometer.view import figures
    run = RunFile.open(Path("runs/demo"))
    figure = figures.loss(run, language="zh", theme="dark")
    plotly.graph_objects.Figure(figure.to_plotly())

Each is a function of a run file and of language ("en", "zh"), theme ("light", "dark") and the range of steps;
none writes anything.
"""

from clinometer.view.figures.batch import batch_loss, shares
from clinometer.view.figures.compare import compare
from clinometer.view.figures.curves import lr, noise, norm, speed
from clinometer.view.figures.gradient_map import gradient_map
from clinometer.view.figures.loss import loss
from clinometer.view.figures.style import Figure
from clinometer.view.figures.tensor import histogram, ridge, tensor
from clinometer.view.figures.weight import waterfall, weight_history

__all__ = [
    "Figure",
    "batch_loss",
    "compare",
    "gradient_map",
    "histogram",
    "loss",
    "lr",
    "noise",
    "norm",
    "ridge",
    "shares",
    "speed",
    "tensor",
    "waterfall",
    "weight_history",
]
