"""The loop: a step does not depend on processes or micro-batches; the chain runs from the shell."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import run_here, run_script
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import train
from data import IGNORE
from world.lessons import curriculum


class Numbers:
    """Samples that are their own indices, of several lengths."""

    def __init__(self, n, phases=1, together=1):
        self.rows = [{"phase": i % phases} | ({"group": i // together} if together > 1 else {})
                     for i in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return index

    def length(self, index):
        return index % 7


def make_epoch(n, phases=1, seed=0, rank=0, world_size=1, global_batch=8, micro_batch=8,
               together=1):
    config = train.Config("vision-text", seed, None, None, [], global_batch=global_batch,
                          micro_batch=micro_batch)

    def collate(samples):
        return {"text": {"labels": torch.tensor(samples)}, "audio": None}

    samples = Numbers(n, phases, together)
    return data.Epoch(config, samples, curriculum(samples.rows, seed), collate, rank,
                       world_size)


@pytest.mark.parametrize("n, global_batch, micro_batch",
                         [(100, 32, 8), (37, 16, 16), (5, 64, 2), (64, 64, 64), (1, 8, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_visits_every_sample_once_however_it_is_dealt(n, global_batch, micro_batch,
                                                               world_size):
    options = {"world_size": world_size, "global_batch": global_batch, "micro_batch": micro_batch}
    ranks, visited = [make_epoch(n, rank=rank, **options) for rank in range(world_size)], []
    assert len(ranks[0]) == math.ceil(n / global_batch)
    for step in range(len(ranks[0])):
        batches = [[batch["text"]["labels"].tolist() for batch in epoch[step]] for epoch in ranks]
        assert len({len(micro_batches) for micro_batches in batches}) == 1, "as many on every rank"
        assert all(1 <= len(batch) <= micro_batch
                   for micro_batches in batches for batch in micro_batches)
        labels = [i for micro_batches in batches for batch in micro_batches
                  for i in batch if i != IGNORE]
        assert (sorted(labels)
                == sorted(sum(ranks[0].order[step * global_batch: (step + 1) * global_batch], [])))
        visited += labels
    assert sorted(visited) == list(range(n))


def test_neighbours_in_length_share_a_micro_batch():
    lengths = [[i % 7 for i in batch["text"]["labels"].tolist()]
               for batch in make_epoch(64, micro_batch=4)[0]]
    assert lengths[0] == sorted(lengths[0]) and max(lengths[0]) <= min(lengths[1])


def test_earlier_phases_come_first_and_seeds_differ():
    order = make_epoch(40, phases=2).order
    assert [i % 2 for i, in order] == [0] * 20 + [1] * 20
    assert sorted(order) == [[i] for i in range(40)]
    assert order == make_epoch(40, phases=2).order != make_epoch(40, phases=2, seed=1).order


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_asked_about_one_picture_stays_together(world_size):
    ranks = [make_epoch(40, phases=2, together=4, rank=rank, world_size=world_size, micro_batch=3)
             for rank in range(world_size)]
    visited = []
    for step in range(len(ranks[0])):
        for batch in (batch["text"]["labels"].tolist() for epoch in ranks for batch in epoch[step]):
            pairs = [pair for pair in zip(batch[::2], batch[1::2]) if IGNORE not in pair]
            assert all(a // 4 == b // 4 and b == a + 2 for a, b in pairs), "a picture, a phase"
            visited += sum(map(list, pairs), [])
    assert sorted(visited) == list(range(40))


FLOAT64 = "tests/train_float64.py"


def losses(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_steps(a, b, rel=1e-9):
    """Whether two runs logged the same steps."""
    for x, y in zip(losses(a), losses(b), strict=True):
        for key in ("loss", "kl", "ce", "grad_norm", "lr"):
            assert x[key] == pytest.approx(y[key], rel=rel), (x["step"], key)


def test_vision_text_on_two_processes_equals_one(world, tmp_path):
    """The stage in which some micro-batches have no picture at all."""
    options = ["--stage", "vision-text", "--data", world / "vision-text", "--global-batch", 24,
               "--micro-batch", 4, "--device", "cpu"]
    one = run_here(FLOAT64, *options, "--out", tmp_path / "one", cwd=tmp_path)
    two = run_script(FLOAT64, *options, "--out", tmp_path / "two", cwd=tmp_path, processes=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    same_steps(tmp_path / "one", tmp_path / "two")


def test_the_chain_makes_what_is_missing_and_reuses_it(world, tmp_path):
    """A default run ends with the table and what to try next; the other scripts find the runs."""
    shutil.copytree(world, tmp_path / "runs/shapes/data-s3")
    first = run_script("train.py", "--seed", 3, "--alpha", 0.5, cwd=tmp_path, processes=1)
    assert first.returncode == 0, first.stderr
    assert "built-in world" in first.stdout.splitlines()[0] and "KD 0.5, gap" in first.stdout
    assert (first.stdout.splitlines()[-1].strip()
            == "torchrun --standalone train.py --alpha 0 --seed 3")
    runs = {path.name for path in (tmp_path / "runs/shapes").iterdir()}
    assert runs == {"data-s3", "vision-text-s3", "audio-text-s3", "vision-audio-a0.5-s3"}
    base = (tmp_path / "runs/shapes/vision-text-s3/model.safetensors").stat().st_mtime_ns
    # With --data, the run does not end with the table.
    sft = ("train.py", "--seed", 3, "--alpha", 0, "--data", "runs/shapes/data-s3/vision-audio")
    second = run_here(*sft, cwd=tmp_path)
    assert second.returncode == 0 and "vision-audio-a0-s3" in second.stdout
    assert (tmp_path / "runs/shapes/vision-text-s3/model.safetensors").stat().st_mtime_ns == base
    again = run_here(*sft, cwd=tmp_path)
    assert again.returncode == 0 and "finished already" in again.stdout
    same = [losses(tmp_path / f"runs/shapes/vision-audio-a{alpha}-s3")[0] for alpha in ("0.5", "0")]
    assert same[0]["ce"] == pytest.approx(same[1]["ce"], rel=1e-5), "the same start and first batch"

    table = run_here("eval.py", "--seed", 3, "--n", 24, "--show", 2, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    columns = (" text |", "aligned, audio", "SFT, audio", "KD 0.5, gap")
    lines = ("KD 0.5 - SFT, spoken: ", "transcripts exact", "wrong, names what is there")
    assert all(text in table.stdout for text in columns + lines)
    align = run_here("mmalign.py", "--seed", 3, cwd=tmp_path)
    assert align.returncode == 0 and "relation" in align.stdout, align.stderr

    cases = run_here("analysis.cases", "--seed", 3, "--n", 3, cwd=tmp_path)
    assert cases.returncode == 0, cases.stderr
    rows = (tmp_path / "runs/report/cases.md").read_text().splitlines()
    assert len(rows) == 2 + 3 and rows[0].count("|") == rows[4].count("|") == 8
    assert Image.open(tmp_path / "runs/report/cases.png").height > 300
    picture, = re.findall(r"!\[\]\((.*?)\)", rows[2])
    assert (tmp_path / "runs/report" / picture).is_file()
    sweep = run_here("analysis.sweep", cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stderr
    assert Image.open(tmp_path / "runs/report/sweep.png").height > 300

    picture = tmp_path / "runs/shapes/data-s3/test/images/000000.png"
    run = tmp_path / "runs/shapes/vision-audio-a0.5-s3"
    one = run_here("eval.py", run, "--image", picture, "--question", "What colour is the circle?",
                   cwd=tmp_path)
    assert (one.returncode == 0 and one.stdout.startswith("KD 0.5    text")
            and "\nKD 0.5    speech" in one.stdout), one.stderr
    unknown = run_here("eval.py", run, "--image", picture, "--question", "is there a unicorn",
                       cwd=tmp_path)
    assert (unknown.returncode == 1 and "'unicorn'" in unknown.stderr
            and "triangle" in unknown.stderr)
    assert unknown.stderr.count("\n") == 1


def test_an_evaluation_that_fails_changes_neither_run_nor_exit_code(world, start, tmp_path, capfd):
    shutil.copytree(world, tmp_path / "runs/shapes/data-s3")
    shutil.rmtree(tmp_path / "runs/shapes/data-s3/test")
    for name, run in (("vision-text-s3", "base"), ("audio-text-s3", "audio")):
        shutil.copytree(start / run, tmp_path / "runs/shapes" / name)
    about = tmp_path / "runs/shapes/audio-text-s3/ollm.json"
    about.write_text(about.read_text().replace('"../base"', '"../vision-text-s3"'))
    done = run_here("train.py", "--seed", 3, cwd=tmp_path)
    assert (done.returncode == 0 and "error: " in capfd.readouterr().err  # its child's
            and "torchrun --standalone train.py --alpha 0" in done.stdout)
    assert (tmp_path / "runs/shapes/vision-audio-a0.75-s3/ollm.json").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--alpha", "2"], "between 0 and 1"),
    (["--stage", "video"], "invalid choice"),
    (["--stage", "vision-audio", "--init", "BASE", "--data", "PART"], "no audio encoder"),
    (["--stage", "vision-audio", "--init", "nowhere", "--data", "PART"], "nowhere"),
    (["--stage", "vision-text", "--data", "nowhere"], "nowhere"),
    (["--stage", "vision-audio", "--init", "AUDIO", "--data", "TRANSCRIPTS"], "samples.jsonl:1: "),
])
def test_what_cannot_work_is_one_clear_line(start, world, tmp_path, arguments, message):
    places = {"BASE": start / "base", "AUDIO": start / "audio", "PART": world / "vision-audio",
              "TRANSCRIPTS": world / "audio-text"}
    done = run_here("train.py", *[places.get(a, a) for a in arguments],
                    "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cut_run_is_another_training(start, world, tmp_path):
    options = ["--init", start / "audio", "--data", world / "vision-audio",
               "--out", tmp_path / "out"]
    done = run_here("train.py", *options, "--max-steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    other = run_here("train.py", *options, "--max-steps", 3, cwd=tmp_path)
    assert other.returncode == 1 and "max_steps is 2 there and 3 here" in other.stderr


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(start, world, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    state = load_file(tmp_path / "start/audio/model.safetensors")
    state["projector.bias"][0] = float("nan")
    save_file(state, tmp_path / "start/audio/model.safetensors")
    done = run_here("train.py", "--init", tmp_path / "start/audio",
                    "--data", world / "vision-audio", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1 and "stopped before the weights were touched" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out/ollm.json").exists()


def test_no_room_for_a_run_is_one_line_and_leaves_nothing_half_written(start, world, tmp_path):
    done = run_script("train.py", "--init", start / "audio", "--data", world / "vision-audio",
                      "--max-steps", 1, "--out", tmp_path / "out", cwd=tmp_path,
                      largest_file=300_000)
    assert (done.returncode == 1 and f"error: {tmp_path / 'out'}" in done.stderr
            and "Traceback" not in done.stderr)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "log.jsonl"}
