"""Grades `seed_interval` (plumbing/tables.py). What `paired_bootstrap` returns is given."""

import random
import statistics

import pytest
from tiny import untouched

from plumbing import tables
from plumbing.tables import seed_interval

T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262,
     11: 2.245, 30: 2.15}  # 97.5 % lie below; beyond ten half-way to the table's last value


def bootstrap(a, b, draws=2000, seed=0):
    """Stands in for paired_bootstrap, which may be empty yet."""
    rng, n = random.Random(seed), len(a)
    differences = [100 * (y - x) for x, y in zip(a, b, strict=True)]
    means = sorted(statistics.fmean(rng.choices(differences, k=n)) for _ in range(draws))
    return statistics.fmean(differences), means[draws // 40], means[-draws // 40]


@pytest.fixture(autouse=True)
def given(monkeypatch):
    monkeypatch.setattr(tables, "paired_bootstrap", bootstrap)


def scores(n_seeds):
    """Returns scores of two runs, a list a seed, some longer: b is right 10 points more often."""
    rng, a, b = random.Random(n_seeds), [], []
    for seed in range(n_seeds):
        chance, n = 0.6 + rng.gauss(0, 0.1), 200 if seed % 2 else 320
        a.append([float(rng.random() < 0.5) for _ in range(n)])
        b.append([float(rng.random() < chance) for _ in range(n)])
    return a, b


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_of_one_or_two_seeds(n_seeds):
    a, b = scores(n_seeds)
    (mean, low, high), _ = seed_interval(*scores(n_seeds))
    expected = bootstrap(sum(a, []), sum(b, []))
    assert mean == pytest.approx(expected[0]), "after - before, in points"
    assert high - low == pytest.approx(expected[2] - expected[1], rel=0.12), (
        "one or two seeds say nothing of further ones: the interval is paired_bootstrap's over the "
        "questions of all seeds together")


@pytest.mark.parametrize("n_seeds", T)
def test_over_seeds(n_seeds):
    a, b = scores(n_seeds)
    (mean, low, high), _ = seed_interval(*scores(n_seeds))
    differences = [100 * (statistics.fmean(y) - statistics.fmean(x)) for x, y in zip(a, b)]
    half = T[n_seeds] * statistics.stdev(differences) / n_seeds ** 0.5
    assert mean == pytest.approx(statistics.fmean(differences)), (
        "the mean is that of the seeds' differences, after - before, in points; a seed counts as "
        "one, however many questions it has")
    for side in (mean - low, high - mean):
        assert side == pytest.approx(half, rel=0.01 if n_seeds < 11 else 0.06), (
            f"of {n_seeds} seeds the interval is t * deviation / sqrt(seeds) on both sides, with "
            f"n - 1 and t of n - 1 degrees of freedom: {half:.2f}, not {side:.2f}")


def test_it_says_how():
    few, many = (seed_interval(*scores(n_seeds))[1] for n_seeds in (1, 3))
    assert isinstance(few, str) and isinstance(many, str) and few != many, (
        "the second value says how the interval was made, over questions or over seeds")


def test_its_arguments_stay():
    for n_seeds in (2, 3):
        runs = scores(n_seeds)
        with untouched(runs):
            seed_interval(*runs)
