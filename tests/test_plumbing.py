"""Errors that keep their cause, locks on odd disks, and models that are no runs of ours."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
from conftest import ROOT, build_internvl2, run_here

from analysis.sweep import scores_of
from plumbing import runs
from plumbing.answers import answers_folder
from plumbing.files import BadInput, atomic_write, folder_lock, readable_errors
from plumbing.media import speak


def test_an_error_that_names_nccl_is_shown_whole():
    """It may be this process's own, and its end says what to do."""
    cause = "CUDA error: out of memory while NCCL " + "x" * 300 + " rank 3 wanted 80 GB"
    with pytest.raises(SystemExit) as exit, readable_errors():
        raise RuntimeError(cause)
    assert cause in str(exit.value) and "\n" not in str(exit.value)


def test_an_error_of_ours_in_torch_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"), readable_errors():
        raise RuntimeError("shapes do not match")


def test_a_disk_without_locks_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BadInput, match="another disk") as error, folder_lock(tmp_path / "run", 0.1):
        pass
    assert str(tmp_path / "run") in str(error.value) and "\n" not in str(error.value)


def test_containers_with_the_same_process_ids_write_apart(tmp_path, monkeypatch):
    """Temporary names are drawn: two containers on one disk may share process ids."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with atomic_write(tmp_path / "x") as one, atomic_write(tmp_path / "x") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other and one.read_text() == "one"
    assert (tmp_path / "x").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call here")
def test_no_more_workers_than_cores_lent():
    """SLURM lends a job some of the machine's cores."""
    program = ("import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
               "from plumbing.processes import workers\n"
               "with workers() as pool:\n print(pool._max_workers)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_espeak_speaks_from_however_long_a_path(tmp_path, monkeypatch):
    """espeak-ng itself ends Python if its data's path has 160 characters."""
    wave, path = speak("what color is the circle")[0], espeakng_loader.get_data_path()
    folder = tmp_path / ("x" * 160)
    folder.mkdir()
    (folder / "espeak-ng-data").symlink_to(path)
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(folder / "espeak-ng-data"))
    assert np.array_equal(speak("what color is the circle")[0], wave)


def test_a_folder_without_a_model_never_stands_for_a_hub_id(tmp_path, monkeypatch):
    """Kept answers may lie in a folder of the hub id's name."""
    monkeypatch.chdir(tmp_path)
    hub_id = "OpenGVLab/InternVL2-1B"
    (tmp_path / hub_id / "predictions").mkdir(parents=True)
    with pytest.raises(BadInput, match="Hugging Face"):  # the tests are offline
        runs.fetch(hub_id)
    assert answers_folder(hub_id).parts[:2] == ("runs", "asked")
    assert answers_folder("../m") != answers_folder("m"), "two models, two places"


def test_mmalign_asks_a_model_that_is_no_run(world, tmp_path):
    """Its answers are kept elsewhere."""
    model = build_internvl2(tmp_path)
    before = sorted(path.name for path in model.iterdir())
    done = run_here("mmalign.py", model, "--data", world / "test", "--n", 2, cwd=tmp_path)
    assert done.returncode == 0 and "relation" in done.stdout, done.stderr
    assert sorted(path.name for path in model.iterdir()) == before
    assert len(list((tmp_path / "runs/asked").glob("*/answers-MMAlign-test.jsonl"))) == 1


def test_answers_of_a_run_that_is_read_only_lie_elsewhere(world, start, tmp_path, monkeypatch):
    shutil.copytree(start, tmp_path / "runs")
    before = sorted(path.name for path in (tmp_path / "runs/audio").iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "audio")
    done = run_here("eval.py", "runs/base", "runs/audio", "--data", world / "test", "--n", 2,
                    cwd=tmp_path)
    assert done.returncode == 0 and "| aligned, audio |" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs/audio").iterdir()) == before
    assert (tmp_path / "runs/asked/runs_audio/answers-mean-test.jsonl").exists()
    assert (tmp_path / "runs/base/answers-mean-test.jsonl").exists()


def config(**changes):
    """What a run's ollm.json tells of its training, with the paths of a seed."""
    seed = changes.get("seed", 0)
    return {"stage": "vision-audio", "alpha": 0.75, "on_policy": 0.0, "temperature": 1.0,
            "lr": 1e-3, "micro_batch": 8, "data": [f"runs/x/data-s{seed}"], **changes}


def write_run(folder, base="../base", **changes):
    """A run, as far as tables need it."""
    about = {"settings": {}, "base": base, "training": config(**{"seed": 0, **changes})}
    if not changes.get("seed"):
        about["settings"]["voice"] = None  # earlier versions wrote it, too
    folder.mkdir(parents=True)
    (folder / "ollm.json").write_text(json.dumps(about))
    return str(folder)


def test_only_seeds_of_one_training_are_averaged(tmp_path):
    """Two "KD 0.75" of other bases or tiles are two columns."""
    for part in ("1b/base", "2b/base"):
        write_run(tmp_path / part, base=None, stage="vision-text")
    seeds = [write_run(tmp_path / f"1b/kd-s{seed}", seed=seed, micro_batch=2 + seed,
                       init=f"runs/x/audio-text_seed{seed}") for seed in range(11)]
    assert runs.group_runs(seeds) == {"KD 0.75": dict(enumerate(seeds))}
    with pytest.raises(BadInput, match="twice"):
        runs.group_runs([*seeds, f"{tmp_path}/1b/../1b/kd-s0/"])

    others = [write_run(tmp_path / "2b/kd-s1", seed=1, init="runs/x/audio-text_seed1"),
              write_run(tmp_path / "1b/tiles", seed=12, max_tiles=6, data=["runs/x/data-s12"]),
              write_run(tmp_path / "1b/rate", seed=13, lr=1e-4),
              write_run(tmp_path / "1b/data", seed=14, data=["prepared/other"]),
              write_run(tmp_path / "1b/again", seed=0, init="runs/x/audio-text_seed0")]
    groups = runs.group_runs([seeds[0], *others, seeds[1]])
    assert groups == {f"KD 0.75 ({seeds[0]})": {0: seeds[0], 1: seeds[1]},
                      **{f"KD 0.75 ({run})": {seed: run}
                         for run, seed in zip(others, (1, 12, 13, 14, 0))}}
    sft = write_run(tmp_path / "1b/sft", alpha=0.0)
    assert list(runs.group_runs([seeds[0], sft])) == ["KD 0.75", "SFT"]


def test_a_sweep_is_of_one_training_for_each_alpha(tmp_path):
    write_run(tmp_path / "kd-s0")
    write_run(tmp_path / "kd-s1", seed=1, lr=1e-4)
    with pytest.raises(BadInput, match=r"another run.*KD 0.75 \("):
        scores_of(tmp_path)


@pytest.mark.parametrize("there", ["data", "data/", "./data", "x/../data", "link", "{}/data"])
def test_a_training_is_the_same_however_its_folders_are_spelled(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    write_run(tmp_path / "run", data=["data", "more"], init="data")
    there = there.format(tmp_path)
    runs.check_same("run", config(seed=0, data=[there, "more/"], init=there))
    for other in (["data"], ["more", "data"], ["data", "x"]):
        with pytest.raises(BadInput, match="another training .data is"):
            runs.check_same("run", config(seed=0, data=other, init="data"))


def test_what_an_earlier_run_answered_is_not_this_run_s(world, start, tmp_path):
    """Kept answers are found by name: a new run in the same folder drops them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "answers-mean.jsonl").write_text(json.dumps({"text": "old"}) + "\n")
    done = run_here("train.py", "--init", start / "audio", "--data", world / "vision-audio",
                    "--max-steps", 1, "--out", out, cwd=tmp_path)
    assert done.returncode == 0 and not (out / "answers-mean.jsonl").exists(), done.stderr
    log = json.loads((out / "log.jsonl").read_text())
    assert "longest_save_s" in log["time"]


def test_a_typed_question_that_is_too_long_to_say_is_one_line(world, start, tmp_path):
    picture = next((world / "test/images").iterdir())
    done = run_here("eval.py", start / "audio", "--image", picture,
                    "--question", "what color " * 60, cwd=tmp_path)
    assert done.returncode == 1 and "30 s" in done.stderr and done.stderr.count("\n") == 1


def test_runs_of_changed_code_stand_beside_the_unchanged(tmp_path):
    """The same settings, another folder: never averaged as if they were one."""
    ours = [write_run(tmp_path / f"kd-s{seed}", seed=seed) for seed in (0, 1)]
    mine = [write_run(tmp_path / f"mine/kd-s{seed}", seed=seed) for seed in (0, 1, 2)]
    for run in ("base", "../base"):
        write_run(tmp_path / "mine" / run, base=None, stage="vision-text")
    assert runs.group_runs([*ours, *mine]) == {f"KD 0.75 ({ours[0]})": dict(enumerate(ours)),
                                               f"KD 0.75 ({mine[0]})": dict(enumerate(mine))}
