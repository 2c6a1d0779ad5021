"""What a step costs: the exact parts change no gradient, and the least possible arithmetic is counted right."""

import argparse
import json

import pytest
import torch
from conftest import run_here, run_script

import bench

ARGS = argparse.Namespace(batch=2, seconds=1.0, question=5, answer=6)


def test_the_table_is_printed_and_the_last_line_is_json(tmp_path):
    done = run_script("bench.py", "--size", "shapes", "--rounds", 2, "--tiles", 3, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "textbook Self-KD / it" in done.stdout and "3 tiles" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"seconds", "ratios", "memory", "flops"}
    assert result["ratios"]["textbook_kd_over_kd_3"] > 1.5 and result["ratios"]["textbook_sft_over_kd_3"] > 1.5
    assert 0.7 < result["ratios"]["kd_over_sft_3"] < 3
    assert 0 < result["memory"]["kd_over_textbook_3"] < 1
    assert 1 <= result["flops"]["over_floor_3"] <= 1.05


def test_the_check_of_gradients_can_fail(monkeypatch):
    exact = bench.ours
    monkeypatch.setattr(bench, "ours", lambda ollm, batch, alpha: exact(ollm, batch, alpha) * (1 + 1e-6))
    assert bench.worst_difference(ARGS) > 1e-7


@pytest.mark.parametrize("tiles", [1, 5])
def test_the_floor_is_what_a_step_without_attention_s_recomputation_takes(tiles):
    """torch's counter over attention as plain products, which keeps its scores instead of computing them again."""
    ollm, optimizer = bench.build("shapes", 1, torch.device("cpu"))
    batch = bench.make_batch(ollm, tiles, ARGS, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), bench.flop_counter() as counter:
        bench.step(ollm, optimizer, batch, bench.ours, 0.75)
    counted, least = counter.get_total_flops(), bench.floor(ollm, batch)
    # What remains: gradients of the prefix's keys and values, which attention computes although nobody asks for them.
    assert least <= counted <= 1.01 * least


@pytest.mark.parametrize("arguments, message", [(["--layers", "0"], "above 0"), (["--seconds", "31"], "up to 30")])
def test_what_cannot_be_timed_is_refused(tmp_path, arguments, message):
    done = run_here("bench.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
