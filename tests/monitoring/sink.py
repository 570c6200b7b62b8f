"""A sink that keeps everything, for tests."""

import numpy as np

from clinometer.vocabulary import STATISTICS


class Kept:
    """All that a watch told, as lists."""

    def __init__(self):
        self.run = None
        self.listed = []
        self.rows = []
        self.counts = []
        self.told = []
        self.pinned = []
        self.events = []
        self.state = None

    def begin(self, run):
        self.run = run

    def tensors(self, tensors):
        self.listed = tensors

    def step(self, step, time, scalars, statistics):
        assert statistics.dtype == np.float32
        assert statistics.shape == (len(self.listed), 8)
        self.rows.append((step, time, scalars, statistics))

    def histograms(self, step, counts):
        self.counts.append((step, counts))

    def alert(self, alert):
        self.told.append(alert)

    def weights(self, step, rows):
        self.pinned.append((step, rows))

    def event(self, step, time, kind, data):
        self.events.append((step, kind, data))

    def close(self, state):
        self.state = state

    # Reading.

    def of(self, name, statistic):
        """The statistic of a tensor, step by step."""
        index = next(t["id"] for t in self.listed if t["name"] == name)
        return [float(row[3][index, STATISTICS.index(statistic)]) for row in self.rows if index < len(row[3])]

    def scalar(self, name):
        return [row[2].get(name) for row in self.rows]

    @property
    def causes(self):
        return sorted({alert["cause"] for alert in self.told})
