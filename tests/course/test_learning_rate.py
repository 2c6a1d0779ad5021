"""Grades `learning_rate` (train.py): the formula, give or take one step."""

import math

import pytest

from train import learning_rate

SIZES = pytest.mark.parametrize("steps, peak", [(100, 2.0), (1000, 3e-4), (5000, 1e-3)])


def check(chosen, steps, peak, formula, cause):
    """Fails with the likely cause unless steps' rates are the formula's of one step more or less.

    So a warm-up from 0 is as right as one from peak / warm-up, and any rounding.
    """
    __tracebackhide__ = True
    for step in chosen:
        around = [peak * formula(k) for k in (step - 1, step, step + 1)]
        rate = learning_rate(step, steps, peak)
        assert isinstance(rate, float), "a rate is a float, which the log can write"
        assert min(around) - 1e-9 * peak <= rate <= max(around) + 1e-9 * peak, (
            f"{cause}; step {step} of {steps} has {rate:.3g}, not about {around[1]:.3g}")


@SIZES
def test_warm_up(steps, peak):
    warmup = round(0.03 * steps)
    check((0, 1, warmup // 3, warmup // 2, warmup - 2), steps, peak, lambda k: (k + 1) / warmup,
          "in the first WARMUP (3 %) of the steps the rate grows linearly to the peak")


@SIZES
def test_cosine(steps, peak):
    warmup = round(0.03 * steps)
    check([warmup + 1, *range(warmup + 2, steps - 1, steps // 20), steps - 2], steps, peak,
          lambda k: 0.5 + 0.5 * math.cos(math.pi * (k - warmup) / (steps - warmup)),
          "after the warm-up, half a cosine from peak to 0 over the steps that are left")


@SIZES
def test_the_largest_rate_is_the_peak(steps, peak):
    rates = [learning_rate(step, steps, peak) for step in range(steps)]
    warmup = round(0.03 * steps)
    assert max(rates) == pytest.approx(peak, rel=1e-3), "the largest rate is the peak"
    assert min(rates[warmup - 1: warmup + 2]) > 0.6 * peak, "no gap after the warm-up"
    assert 0 <= rates[-1] < peak * 1e-3, "the last rate is about 0"


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_few_steps(steps):
    rates = [learning_rate(step, steps, 2.0) for step in range(steps)]
    assert all(0 <= rate <= 2 + 1e-9 for rate in rates), "a handful of steps: from 0 to the peak"
