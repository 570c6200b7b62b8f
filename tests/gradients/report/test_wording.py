import pytest

from clinometer.gradients.report.formatting import cell_width, format_count, format_number, shorten


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.5, "0.5000"),
        (1.0, "1.000"),
        (1234.4, "1234"),
        (0.001, "0.001000"),
        (0.00099, "9.900e-04"),
        (9999.0, "9999"),
        (9999.9, "1.000e+04"),
        (12345, "1.234e+04"),
        (-0.0001994, "−1.994e-04"),
        (-2.5, "−2.500"),
        (5e-324, "4.941e-324"),
    ],
)
def test_a_number_has_four_significant_digits(x, text):
    assert format_number(x) == text


def test_a_sign_is_written_where_it_means_something():
    assert format_number(0.001842, sign=True) == "+0.001842"
    assert format_number(1.842e-4, sign=True) == "+1.842e-04"
    assert format_number(-1.842e-4, sign=True) == "−1.842e-04"
    assert format_number(0.0, sign=True) == "0"


def test_what_is_not_finite_comes_with_its_place():
    assert format_number(float("nan"), place="[3, 5]") == "NaN at [3, 5]"
    assert format_number(float("nan"), place="[3, 5]", language="zh") == "NaN，位于 [3, 5]"
    assert format_number(float("-inf"), place="[0]") == "−∞ at [0]"
    assert format_number(float("inf"), place="") == "+∞"
    assert format_number(float("nan")) == "NaN (place not recorded)"


def test_counts_have_their_thousands_apart():
    assert format_count(124439808) == "124,439,808"
    assert (format_count(0), format_count(-1000)) == ("0", "−1,000")


def test_a_long_list_is_shortened_in_both_languages():
    names = [f"w{i}" for i in range(27)]
    assert shorten(names) == "w0, w1, w2 and 24 more"
    assert shorten(names, language="zh") == "w0、w1、w2，另有 24 个"
    assert shorten(names[:3]) == "w0, w1, w2"
    assert shorten(names[:4]) == "w0, w1, w2 and 1 more"
    assert shorten(names[:1], language="zh") == "w0"
    assert shorten([]) == ""


def test_wide_characters_count_two_columns_and_marks_none():
    assert cell_width("abc") == 3
    assert cell_width("梯度 a") == 6
    assert cell_width("√v̂ − β₁") == 7
    assert cell_width("，") == 2
