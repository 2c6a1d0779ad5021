"""Grades `paired_bootstrap` (plumbing/tables.py) where the interval is known."""

import random
import statistics

import pytest
from tiny import untouched

from plumbing.tables import paired_bootstrap

RNG = random.Random(0)
A = [RNG.random() for _ in range(100)]
B = [(score + 3 * RNG.random()) / 4 for score in A]


def test_the_mean():
    mean, low, high = paired_bootstrap([*A], [*B])
    assert mean == pytest.approx(100 * (sum(B) - sum(A)) / len(A)), (
        "the mean is that of b - a over the questions, in points (times 100)")
    assert low < mean < high, "low, mean and high stand in this order"


def test_the_width():
    mean, low, high = paired_bootstrap(A, B, draws=20_000)
    half = 196 * statistics.pstdev(y - x for x, y in zip(A, B)) / len(A) ** 0.5
    for side in (mean - low, high - mean):
        assert side == pytest.approx(half, rel=0.07), (
            f"low and high are the 2.5 and 97.5 percentiles of the draws' means: about {half:.1f} "
            f"points around the mean, not {side:.1f}")


@pytest.mark.parametrize("place", [0, 17, 39])
def test_one_question_gains(place):
    gain = [float(i == place) for i in range(40)]
    for a, b, expected in (([0.0] * 40, gain, (2.5, 0, 7.5)), (gain, [0.0] * 40, (-2.5, -7.5, 0))):
        assert paired_bootstrap(a, b) == pytest.approx(expected), (
            "every question can be drawn, the first and the last, too, once or several times; low "
            "and high are percentiles of the draws, no formula")


def test_few_questions():
    _, *interval = paired_bootstrap([0.0] * 4, [0.0, 0.0, 0.0, 1.0])
    assert interval == [0, 75], "a draw takes as many questions as there are: 4"
    assert paired_bootstrap([1.0, 0.0], [1.0, 0.0]) == (0, 0, 0), (
        "where each question's answers score the same, no draw differs: the draws are paired")


def test_draws_and_seed():
    assert paired_bootstrap(A, B) == paired_bootstrap(A, B), "the same seed, the same draws"
    assert paired_bootstrap(A, B, seed=1) != paired_bootstrap(A, B), "another seed, other draws"
    many, few = ([paired_bootstrap(A, B, draws, seed)[1] for seed in range(20)]
                 for draws in (2000, 20))
    assert statistics.stdev(few) > 3 * statistics.stdev(many), "so many draws as asked for"


def test_its_arguments_stay():
    with untouched(A, B):
        paired_bootstrap(A, B)
