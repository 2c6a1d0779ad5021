"""The loop: what a step learns from does not depend on processes or micro-batches; the chain runs from the shell."""

import json
import math
import re
import shutil

import pytest
from conftest import run_here, run_script
from PIL import Image

from safetensors.torch import load_file, save_file
import train


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(2 / 3) and max(rates) == rates[3] == 2.0
    assert rates[51] == pytest.approx(1 + math.cos(math.pi * 48 / 97)) and 0 < rates[99] < 0.01
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))
    assert train.learning_rate(0, 1, 2.0) == 2.0, "an epoch of one step still learns"


@pytest.mark.parametrize("n, global_batch, micro_batch", [(100, 32, 8), (37, 16, 16), (5, 64, 2), (64, 64, 64)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_visits_every_sample_once_however_it_is_dealt(n, global_batch, micro_batch, world):
    visited, order = [], train.epoch_order([{}] * n, seed=0)
    for step in range(math.ceil(n / global_batch)):
        ranks = [train.deal(order, step, global_batch, micro_batch, lambda i: i % 7, r, world) for r in range(world)]
        assert len({len(chunks) for chunks in ranks}) == 1, "as many micro-batches on every rank"
        samples = [i for chunks in ranks for indices, idle in chunks for i in indices if not idle]
        assert sorted(samples) == sorted(order[step * global_batch: (step + 1) * global_batch])
        assert all(1 <= len(indices) <= micro_batch for chunks in ranks for indices, _ in chunks)
        visited += samples
    assert sorted(visited) == list(range(n))


def test_earlier_phases_come_first_and_seeds_differ():
    rows = [{"phase": i % 2} for i in range(40)]
    order = train.epoch_order(rows, seed=0)
    assert [rows[i]["phase"] for i in order] == [0] * 20 + [1] * 20 and sorted(order) == list(range(40))
    assert order == train.epoch_order(rows, seed=0) != train.epoch_order(rows, seed=1)


def losses(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_steps(a, b, rel=1e-9):
    """Whether two runs logged the same steps."""
    for x, y in zip(losses(a), losses(b), strict=True):
        for key in ("loss", "kl", "ce", "grad_norm", "lr"):
            assert x[key] == pytest.approx(y[key], rel=rel), (x["step"], key)


@pytest.mark.slow
def test_three_processes_compute_the_same_steps_as_one(start, world, tmp_path):
    """The last batch has one sample: two of the processes have none. (Two processes: test_faults.py.)"""
    options = ["--stage", "vision-audio", "--alpha", 0.75, "--init", start / "audio", "--data", world / "vision-audio",
               "--global-batch", 33, "--micro-batch", 3, "--lr", 1e-3, "--float64", "--device", "cpu"]
    one = run_here("train.py", *options, "--out", tmp_path / "one", cwd=tmp_path)
    many = run_script("train.py", *options, "--out", tmp_path / "many", cwd=tmp_path, processes=3)
    assert one.returncode == 0 and many.returncode == 0, one.stderr + many.stderr
    same_steps(tmp_path / "one", tmp_path / "many")


def test_vision_text_on_two_processes_equals_one(world, tmp_path):
    """The stage in which some micro-batches have no picture at all."""
    options = ["--stage", "vision-text", "--data", world / "vision-text", "--global-batch", 24, "--micro-batch", 4,
               "--float64", "--device", "cpu"]
    for processes in (0, 2):
        done = run_script("train.py", *options, "--out", tmp_path / str(processes), cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
    same_steps(tmp_path / "0", tmp_path / "2")


def test_the_chain_makes_what_is_missing_and_reuses_it(world, tmp_path):
    shutil.copytree(world, tmp_path / "runs/shapes/data-s3")
    first = run_script("train.py", "--seed", 3, "--alpha", 0.5, cwd=tmp_path, processes=1)
    assert first.returncode == 0, first.stderr
    assert "built-in world" in first.stdout.splitlines()[0] and "python eval.py" in first.stdout
    runs = {path.name for path in (tmp_path / "runs/shapes").iterdir()}
    assert runs == {"data-s3", "vision-text-s3", "audio-text-s3", "vision-audio-a0.5-s3"}
    base = (tmp_path / "runs/shapes/vision-text-s3/model.safetensors").stat().st_mtime_ns
    second = run_here("train.py", "--seed", 3, "--alpha", 0, cwd=tmp_path)
    assert second.returncode == 0 and "vision-audio-a0-s3" in second.stdout
    assert (tmp_path / "runs/shapes/vision-text-s3/model.safetensors").stat().st_mtime_ns == base
    again = run_here("train.py", "--seed", 3, "--alpha", 0, cwd=tmp_path)
    assert again.returncode == 0 and "finished already" in again.stdout
    same = [losses(tmp_path / f"runs/shapes/vision-audio-a{alpha}-s3")[0] for alpha in ("0.5", "0")]
    assert same[0]["ce"] == pytest.approx(same[1]["ce"], rel=1e-5), "the same start and the same first batch"

    table = run_here("eval.py", "--seed", 3, "--n", 24, "--show", 2, "--cases", 3, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert all(column in table.stdout for column in (" text |", "aligned, audio", "SFT, audio", "KD 0.5, gap"))
    assert all(line in table.stdout for line in ("KD 0.5 - SFT", "transcripts exact", "wrong, names what is there"))
    cases = (tmp_path / "runs/report/cases.md").read_text().splitlines()
    assert len(cases) == 2 + 3 and cases[0].count("|") == cases[4].count("|") == 8
    assert Image.open(tmp_path / "runs/report/cases.png").height > 300
    picture, = re.findall(r"!\[\]\((.*?)\)", cases[2])
    assert (tmp_path / "runs/report" / picture).is_file()
    align = run_here("mmalign.py", "--seed", 3, cwd=tmp_path)
    assert align.returncode == 0 and "relation" in align.stdout, align.stderr
    picture = tmp_path / "runs/shapes/data-s3/test/images/000000.png"
    run = tmp_path / "runs/shapes/vision-audio-a0.5-s3"
    one = run_here("eval.py", run, "--image", picture, "--question", "What colour is the circle?", cwd=tmp_path)
    assert one.returncode == 0 and one.stdout.startswith("text ") and "\naudio " in one.stdout, one.stderr
    unknown = run_here("eval.py", run, "--image", picture, "--question", "is there a unicorn", cwd=tmp_path)
    assert unknown.returncode == 1 and "'unicorn'" in unknown.stderr and "triangle" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    (["--alpha", "2"], "between 0 and 1"),
    (["--temperature", "0"], "above 0"),
    (["--stage", "video"], "invalid choice"),
    (["--max-steps", "0"], "at least 1"),
    (["--stage", "vision-audio", "--init", "BASE", "--data", "PART"], "no audio encoder"),
    (["--stage", "vision-audio", "--init", "nowhere", "--data", "PART"], "not a finished run"),
    (["--stage", "vision-text", "--data", "nowhere"], "no such file"),
    (["--stage", "vision-audio", "--init", "AUDIO", "--data", "TRANSCRIPTS"], "samples.jsonl:1: has no question"),
])
def test_what_cannot_work_is_one_clear_line(start, world, tmp_path, arguments, message):
    places = {"BASE": start / "base", "AUDIO": start / "audio", "PART": world / "vision-audio",
              "TRANSCRIPTS": world / "audio-text"}
    done = run_here("train.py", *[places.get(a, a) for a in arguments], "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(start, world, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    state = load_file(tmp_path / "start/audio/model.safetensors")
    state["projector.bias"][0] = float("nan")
    save_file(state, tmp_path / "start/audio/model.safetensors")
    about = json.loads((tmp_path / "start/audio/ollm.json").read_text())
    del about["fingerprint"]  # as the message says that refuses weights which are not those that were saved
    (tmp_path / "start/audio/ollm.json").write_text(json.dumps(about))
    done = run_here("train.py", "--init", tmp_path / "start/audio", "--data", world / "vision-audio", "--out",
                    tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1 and "stopped before the weights were touched" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out/ollm.json").exists()


def test_no_room_for_a_checkpoint_is_one_line_and_leaves_nothing_half_written(start, world, tmp_path):
    done = run_script("train.py", "--init", start / "audio", "--data", world / "vision-audio", "--max-steps", 1,
                      "--out", tmp_path / "out", cwd=tmp_path, largest_file=300_000)
    assert done.returncode == 1 and "could not save the run" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "log.jsonl"}
