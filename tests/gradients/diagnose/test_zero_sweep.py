"""Every zero of torch's operations is said, with a cause and a line; no operation with a slope is accused."""

from collections import Counter

import pytest
from tests.gradients.diagnose.zero_sweep import MISSED, answer, places

PLACES = [place for place in places() if (place.name, place.point) not in MISSED]


def sweep(chosen):
    answers = [(place, answer(place)) for place in chosen]
    wrong = [f"{place.name} at {place.point}: {found.wrong}" for place, found in answers if found.wrong]
    assert not wrong, "\n".join(wrong)
    return Counter(found.gradient for _, found in answers)


@pytest.mark.filterwarnings("ignore")
def test_of_every_twelfth_operation_and_point_the_zeros_are_said():
    counts = sweep(PLACES[::12])
    assert counts["zero"] >= 20
    assert counts["some"] >= 50


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_of_all_operations_and_points_the_zeros_are_said():
    counts = sweep(PLACES)
    assert counts["zero"] >= 350
    assert counts["some"] >= 750
