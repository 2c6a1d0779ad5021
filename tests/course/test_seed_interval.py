"""Grades `seed_interval` (plumbing/tables.py). What `paired_bootstrap` returns is given."""

import random
import statistics

import pytest

from plumbing import tables
from plumbing.tables import seed_interval


def bootstrap(a, b, draws=2000, seed=0):
    """Stands in for paired_bootstrap, which may be empty yet."""
    rng, n = random.Random(seed), len(a)
    differences = [100 * (y - x) for x, y in zip(a, b)]
    means = sorted(statistics.fmean(rng.choices(differences, k=n)) for _ in range(draws))
    return statistics.fmean(differences), means[draws // 40], means[-draws // 40]


@pytest.fixture(autouse=True)
def given(monkeypatch):
    monkeypatch.setattr(tables, "paired_bootstrap", bootstrap)


def scores(n_seeds, spread=0.1, n=200):
    """Returns scores of two runs, a list a seed: b is right 10 points more often, or more or less.
    """
    rng = random.Random(n_seeds)
    a = [[float(rng.random() < 0.5) for _ in range(n)] for _ in range(n_seeds)]
    chances = [0.6 + rng.gauss(0, spread) for _ in range(n_seeds)]
    return a, [[float(rng.random() < chance) for _ in range(n)] for chance in chances]


# 97.5 % of Student's t lie below; of more than ten seeds the table's last value may stand.
@pytest.mark.parametrize("n_seeds, t", [(3, 4.303), (4, 3.182), (5, 2.776), (8, 2.365), (10, 2.262),
                                        (30, 2.15)])
def test_over_seeds(n_seeds, t):
    a, b = scores(n_seeds)
    (mean, low, high), _ = seed_interval(a, b)
    differences = [100 * (statistics.fmean(y) - statistics.fmean(x)) for x, y in zip(a, b)]
    half = t * statistics.stdev(differences) / n_seeds ** 0.5
    assert mean == pytest.approx(statistics.fmean(differences)), (
        "the mean is that of the seeds' differences, after - before, in points")
    assert (high - low) / 2 == pytest.approx(half, rel=0.06 if n_seeds > 10 else 0.01), (
        f"of {n_seeds} seeds the interval is t * deviation / sqrt(seeds) on both sides, deviation "
        f"with n - 1 and t of n - 1 degrees of freedom: {half:.2f}, not {(high - low) / 2:.2f}")
    assert mean - low == pytest.approx(high - mean), "the mean lies in the middle"


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_of_one_or_two_seeds(n_seeds):
    a, b = scores(n_seeds)
    (mean, low, high), _ = seed_interval(a, b)
    before, after = sum(a, []), sum(b, [])
    wanted = bootstrap(before, after)
    assert mean == pytest.approx(wanted[0]), "after - before, in points"
    assert high - low == pytest.approx(wanted[2] - wanted[1], rel=0.12), (
        "one or two seeds say nothing of further ones: the interval is paired_bootstrap's over the "
        "questions of all seeds together")


def test_it_says_how():
    few, many = (seed_interval(*scores(n_seeds))[1] for n_seeds in (1, 3))
    assert isinstance(few, str) and isinstance(many, str) and few != many, (
        "the second value says how the interval was made, over questions or over seeds")


def test_it_covers_the_true_difference():
    covered = 0
    for i in range(100):
        rng = random.Random(i)
        gains = [rng.gauss(0.1, 0.1) for _ in range(5)]
        (_, low, high), _ = seed_interval([[0.5] * 4] * 5, [[0.5 + gain] * 4 for gain in gains])
        covered += low <= 10 <= high
    assert 89 <= covered <= 99, f"a 95 % interval covers the truth 95 times of 100, not {covered}"
