"""One training, watched: in one process with the whole batch, and on several ranks with a part of it each.

`train` is the loop that a user writes; what differs between one process and many is how the model is made.
"""

import torch
from torch import nn

from clinometer.monitoring.watch import watch
from clinometer.optim.clipping import clip_grad_norm_
from tests.monitoring.sink import Kept

WHOLE = 8
PINS = [("inner.weight", (2, 4)), ("embed.weight", (0, 1)), ("head.bias", (0,))]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)  # four rows and three
        self.inner = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.head = nn.Linear(3, 1)  # one row: the second rank holds nothing of it
        self.rest = nn.Linear(3, 3)  # never used: no gradient

    def forward(self, ids):
        h = self.norm(self.inner(self.embed(ids)))
        return self.head(torch.tanh(h + self.down(torch.relu(self.up(h)))))


def ids_of(step):
    """The whole batch of a step; token 6 is in none, so its row's gradient is zero."""
    return torch.randint(0, 6, (WHOLE, 4), generator=torch.Generator().manual_seed(100 + step))


def parts_of(step, parts, rank, ranks):
    """This rank's part of each micro-batch."""
    return [micro.chunk(ranks)[rank] for micro in ids_of(step).chunk(parts)]


def train(
    model,
    *,
    rank=0,
    ranks=1,
    steps=18,
    parts=1,
    clip=clip_grad_norm_,
    spoil=None,
    no_sync=None,
    zero=True,
    closure=False,
    every=1,
    pins=(),
    optimizer=None,
    before_step=lambda step: True,
    loop=None,
):
    """Returns the sink, the watch and the losses as this rank saw them."""
    sink = Kept()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    one = watch(model, optimizer, sink, every)
    for name, index in pins:
        one.pin(name, index)
    if closure:
        one.closure = lambda: model(parts_of(one.step + 1, parts, rank, ranks)[0]).square().mean()
    for step in range(1, steps + 1):
        if zero:
            optimizer.zero_grad()
        micros = parts_of(step, parts, rank, ranks)
        for number, micro in enumerate(micros):
            if no_sync:
                no_sync(number == len(micros) - 1)
            loss = model(micro).square().mean() / parts
            if spoil:
                loss = spoil(loss, step, rank)
            loss.backward()
        if clip:
            clip(model.parameters(), 0.02)
        if before_step(step):
            optimizer.step()
        if loop:
            loop(one, step)
    one.close()
    return sink, one


def facts_of(sink, one):
    """What may be compared between ranks and with one process, as plain data."""
    return {
        "names": [t["name"] for t in sink.listed],
        "positions": [t["position"] for t in sink.listed],
        "numel": [t["numel"] for t in sink.listed],
        "rows": [[step, statistics.tolist()] for step, _, _, statistics in sink.rows],
        "counts": [[step, counts.tolist()] for step, counts in sink.counts],
        "scalars": [
            {k: v for k, v in scalars.items() if k not in ("seconds", "memory")}
            for _, _, scalars, _ in sink.rows
        ],
        "pinned": sink.pinned,
        "alerts": one.alerts,
        "events": [[step, kind] for step, kind, _ in sink.events],
        "state": sink.state,
    }
