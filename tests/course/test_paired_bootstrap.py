"""Grades `paired_bootstrap` (plumbing/tables.py) where the interval is known."""

import random
import statistics

import pytest

from plumbing.tables import paired_bootstrap


def scores(n=300):
    """Returns two lists of scores that are alike on most questions."""
    rng = random.Random(0)
    a = [float(rng.random() < 0.5) for _ in range(n)]
    b = [score if rng.random() < 0.8 else float(rng.random() < 0.8) for score in a]
    return a, b


def test_the_mean():
    a, b = scores()
    mean, _, _ = paired_bootstrap(a, b)
    assert mean == pytest.approx(100 * (sum(b) - sum(a)) / len(a)), (
        "the mean is that of b - a over the questions, in points (times 100)")


def test_the_width():
    a, b = scores()
    mean, low, high = paired_bootstrap(a, b)
    differences = [100 * (y - x) for x, y in zip(a, b)]
    half = 1.96 * statistics.pstdev(differences) / len(a) ** 0.5
    assert low < mean < high, "low, mean and high stand in this order"
    assert (high - low) / 2 == pytest.approx(half, rel=0.12), (
        f"low and high are the 2.5 and 97.5 percentiles of the draws' means: about {half:.1f} "
        f"points around the mean, not {(high - low) / 2:.1f}. Are as many questions drawn as there "
        "are, and both answers to each?")
    assert mean - low == pytest.approx(half, rel=0.2) == high - mean, "about symmetrical here"


def test_percentiles_and_no_formula():
    low = paired_bootstrap([0.0] * 40, [1.0] * 2 + [0.0] * 38)[1]
    assert low >= 0, "no draw's mean is below 0 here, so low, their percentile, is not either"


def test_no_difference():
    assert paired_bootstrap([1.0, 0.0], [1.0, 0.0]) == (0, 0, 0), (
        "where each question's answers score the same, no draw differs: the draws are paired")


def test_it_can_be_repeated():
    rng = random.Random(0)
    a, b = ([rng.random() for _ in range(60)] for _ in range(2))
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b), "the same seed, the same draws"
