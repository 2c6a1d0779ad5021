"""What a step costs: the exact parts change no gradient, and the arithmetic is counted right."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis import bench

ARGS = argparse.Namespace(batch=2, seconds=1.0, question=5, answer=6)


@pytest.mark.slow
def test_the_table_is_printed_and_the_last_line_is_json():
    command = [sys.executable, "-m", "analysis.bench", "--size", "shapes", "--rounds", "1",
               "--tiles", "3", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert "textbook Self-KD / it" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"seconds", "ratios", "memory", "flops"}
    flops = result["flops"]  # seconds would depend on what else the machine does
    assert 1 < flops["kd_3"] / flops["sft_3"] < 1.15 and flops["textbook_kd_3"] > 5 * flops["kd_3"]
    assert 1 <= flops["over_floor_3"] <= 1.05
    assert set(result["ratios"]) == {f"{key}_3" for key in bench.RATIOS}
    assert all(value > 0 for value in result["ratios"].values())
    assert 0 < result["memory"]["kd_over_textbook_3"] < 1


@pytest.mark.slow
def test_the_check_of_gradients_can_fail(monkeypatch):
    assert bench.worst_difference(ARGS) < 1e-9
    exact = bench.ours
    monkeypatch.setattr(bench, "ours", lambda *args: exact(*args) * (1 + 1e-6))
    assert bench.worst_difference(ARGS) > 1e-7


@pytest.mark.parametrize("tiles", [1, 5])
def test_the_floor_is_what_a_step_takes_less_the_prefix_s_last_layer(tiles):
    """Counts attention as plain products, which keep their scores and do not compute them twice."""
    ollm, optimizer = bench.build("shapes", 1, torch.device("cpu"))
    batch = bench.make_batch(ollm, tiles, ARGS, 0)
    with sdpa_kernel(SDPBackend.MATH), bench.flop_counter() as counter:
        bench.step(ollm, optimizer, batch, bench.ours, 0.75)

    # A step computes the last layer's output at the prefix, too, of which only keys and values are
    # read: there are 128 x 128 weights for queries and outputs each, and 3 x 128 x 256 in the MLP.
    samples, prefix = batch["prefix"]["ids"].shape
    unread = samples * bench.layer_flops(prefix, prefix, 128, 2 * 128**2 + 3 * 128 * 256)
    counted, least = counter.get_total_flops() - unread, bench.floor(ollm, batch)
    # What remains are gradients of the prefix's keys and values, which attention computes in vain.
    assert least <= counted <= 1.01 * least
