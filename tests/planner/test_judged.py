"""Scores, regret and bands of predictions."""

import math

import pytest

from turbopump.planner.judged import UNKNOWN_HALF_WIDTH, Row, by_group, half_width, regrets_of, score


def row(predicted, measured=1.0, *, group="a", choice="", **more):
    return Row("t", group, "x", predicted, measured, "s", choice=choice, **more)


def test_error_and_bias():
    found = score([row(1.1), row(0.9), row(2.0, 1.0), row(1.0)])
    assert found.num_rows == 4
    assert found.error == pytest.approx(0.3) and found.bias == pytest.approx(0.25)
    assert found.median_error == pytest.approx(0.1)
    assert found.coverage is None and found.width is None and found.regret is None and found.false_fits is None


def test_the_band_covers_what_lies_within_it():
    rows = [row(1.0, low=0.9, high=1.1), row(1.5, low=1.2, high=1.8)]
    found = score(rows)
    assert found.coverage == 0.5 and found.width == pytest.approx((0.1 + 0.2) / 2)
    assert found.width_over_error == pytest.approx(0.15 / 0.25)
    assert rows[0].covered and not rows[1].covered
    assert score([*rows, row(3.0)]).coverage == 0.5  # rows without a band are not counted


def test_regret_is_that_of_the_predicted_best():
    rows = [row(1.0, 1.5, choice="c"), row(2.0, 1.0, choice="c"), row(1.0, 1.0, choice="alone"), row(1.0, 5.0)]
    assert regrets_of(rows) == [pytest.approx(0.5)]
    same = [row(1.0, 1.0, choice="c"), row(1.0, 2.0, choice="c")]
    assert regrets_of(same) == [pytest.approx(0.5)]  # predicted alike: no luck of the order
    assert regrets_of(list(reversed(same))) == regrets_of(same)
    assert regrets_of([row(1.0, choice="c"), row(1.0, choice="c", group="b")]) == []  # choices do not cross groups


def test_a_false_fit_is_one_at_any_size_of_device():
    rows = [row(10, 10, asked=12.0, capacity=80.0), row(10, 14, asked=12.0, capacity=80.0),
            row(79, 70, asked=85.0, capacity=80.0)]  # fmt: skip
    found = score(rows)
    assert (found.false_fits, found.false_rejections) == (1, 1)
    assert score([row(1.0, asked=0.5)]).false_rejections is None  # no device is known


def test_a_band_does_not_see_its_own_group():
    errors = {"a": [5.0] * 40, "b": [0.1] * 20, "c": [0.2] * 20}
    assert half_width(errors, without="a") == pytest.approx(0.2)
    assert half_width(errors, without="b") == pytest.approx(5.0)
    assert half_width({"a": [0.1] * 50}, without="a") == UNKNOWN_HALF_WIDTH
    assert half_width({}, without="") == UNKNOWN_HALF_WIDTH


def test_a_large_group_does_not_decide_a_band_alone():
    errors = {"many": [0.01] * 400, **{f"few{i}": [1.0] * 4 for i in range(10)}}
    assert half_width(errors) == 1.0  # 400 of one model weigh 20, not 400


def test_groups_come_in_order():
    rows = [row(1.0, group="z"), row(2.0, group="a"), row(3.0, group="z")]
    found = by_group(rows)
    assert list(found) == ["z", "a"] and found["z"].num_rows == 2
    assert math.isclose(found["a"].error, 1.0)
