"""What a step costs: the exact parts change no gradient, and the arithmetic is counted right."""

import argparse
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from analysis import bench

ARGS = argparse.Namespace(batch=2, seconds=1.0, question=5, answer=6)


@pytest.mark.slow
def test_the_table_is_printed_and_the_last_line_is_json():
    command = [sys.executable, "-m", "analysis.bench", "--size", "shapes", "--rounds", "1",
               "--tiles", "3", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert "naive Self-KD / it" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"seconds", "ratios", "memory", "flops"}
    flops = result["flops"]  # seconds would depend on what else the machine does
    assert 1 < flops["kd_3"] / flops["sft_3"] < 1.15 and flops["naive_kd_3"] > 5 * flops["kd_3"]
    assert set(result["ratios"]) == {f"{key}_3" for key in bench.RATIOS}
    assert all(value > 0 for value in result["ratios"].values())


@pytest.mark.slow
def test_the_check_of_gradients_can_fail(monkeypatch):
    assert bench.worst_difference(ARGS) < 1e-9
    exact = bench.ours
    monkeypatch.setattr(bench, "ours", lambda *args: exact(*args) * (1 + 1e-6))
    assert bench.worst_difference(ARGS) > 1e-7
