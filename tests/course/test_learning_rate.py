"""Grades `learning_rate` (train.py): the formula, give or take one step."""

import math

import pytest

from train import learning_rate

STEPS, WARMUP, PEAK = 1000, 30, 2.0


def check(step, formula, cause):
    """Fails with the likely cause unless a step's rate is the formula's, one step before or after.

    So a warm-up from 0 is as right as one from peak / warm-up, and any rounding.
    """
    __tracebackhide__ = True
    around = [formula(step - 1), formula(step), formula(step + 1)]
    rate = learning_rate(step, STEPS, PEAK)
    assert min(around) - 1e-9 <= rate <= max(around) + 1e-9, (
        f"{cause}; step {step} of {STEPS} has {rate:.4f}, not about {around[1]:.4f}")


@pytest.mark.parametrize("step", [0, 1, 10, 20, 28])
def test_warm_up(step):
    check(step, lambda k: PEAK * (k + 1) / WARMUP,
          "in the first WARMUP (3 %) of the steps the rate grows linearly to the peak")


@pytest.mark.parametrize("step", [31, 100, 250, 515, 750, 900, 998])
def test_cosine(step):
    check(step, lambda k: PEAK / 2 * (1 + math.cos(math.pi * (k - WARMUP) / (STEPS - WARMUP))),
          "after the warm-up, half a cosine from peak to 0 over the steps that are left")


def test_the_largest_rate_is_the_peak():
    rates = [learning_rate(step, STEPS, PEAK) for step in range(STEPS)]
    assert max(rates) == pytest.approx(PEAK, rel=1e-3), "the largest rate is the peak"
    assert 0 <= rates[-1] < PEAK * 1e-4, "the last rate is about 0"


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_few_steps(steps):
    rates = [learning_rate(step, steps, PEAK) for step in range(steps)]
    assert all(0 <= rate <= PEAK + 1e-9 for rate in rates), (
        "a handful of steps has rates between 0 and the peak, too")
