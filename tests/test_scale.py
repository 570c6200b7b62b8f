"""docs/*/scale.md holds the table that its script computes, and names the constants it computes with."""

import math
import re
from pathlib import Path

import pytest

from benchmarks import scale

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_holds_the_table_and_its_constants(language):
    text = (DOCS / language / "scale.md").read_text(encoding="utf-8")
    assert scale.table() in text
    for number in (scale.ROW_BYTES, scale.HISTOGRAM_BYTES, scale.READ_BYTES, scale.EXTRA):
        assert re.search(rf"\b{re.escape(str(number))}\b", text), number
    assert f"{scale.HOP_SECONDS * 1e6:.0f} µs" in text
    small, middle, _ = scale.MODELS
    for model in (small, middle):  # how rarely to look where the exchange takes longer than a step
        steps = math.ceil(scale.exchange_seconds(16384) / scale.step_seconds(model))
        assert re.search(rf"{model.name}[^.。]* {steps}\b" if language == "en" else rf"{steps}\b", text)


def test_the_vectors_of_a_step_are_as_long_as_the_page_says():
    from clinometer.monitoring.measure import pins, rank_sums

    columns = rank_sums._COLUMNS
    room = pins.MOST * 2 * len(pins._NUMBERS)
    flags = 2 * len(rank_sums.COMPARED) + len(rank_sums.LARGEST)
    assert (columns, 2) == (scale.SUMS, scale.MAXIMA)
    assert room + len(rank_sums.SUMMED) + flags == scale.EXTRA
