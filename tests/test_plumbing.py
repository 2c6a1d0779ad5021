"""Errors that keep their cause, locks on odd disks, and models that are no runs of ours."""

import errno
import fcntl
import json

import pytest
from conftest import build_internvl2, run_here

from plumbing import runs
from plumbing.files import BadInput, only_writer, readable_errors


def test_an_error_that_names_nccl_is_shown_whole():
    """It was cut at 100 characters, and called the failure of another process."""
    cause = "CUDA error: out of memory while NCCL " + "x" * 300 + " rank 3 wanted 80 GB"
    with pytest.raises(SystemExit) as exit, readable_errors():
        raise RuntimeError(cause)
    assert cause in str(exit.value) and "\n" not in str(exit.value)


def test_an_error_of_ours_in_torch_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"), readable_errors():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_one_line_that_says_what_to_do(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BadInput, match="another disk") as error, only_writer(tmp_path / "run", 0.1):
        pass
    assert str(tmp_path / "run") in str(error.value) and "\n" not in str(error.value)


def test_a_disk_that_knows_no_flock_is_locked_by_a_file(tmp_path, monkeypatch):
    """It stopped everything with [Errno 38]."""
    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with only_writer(tmp_path / "run", 0.1):
        assert (tmp_path / "run").is_dir()


def test_a_folder_without_a_model_never_stands_for_a_hub_id(tmp_path, monkeypatch):
    """Asking a hub id once left a folder of that name, which later commands took for the model."""
    monkeypatch.chdir(tmp_path)
    hub_id = "OpenGVLab/InternVL2-1B"
    (tmp_path / hub_id / "predictions").mkdir(parents=True)
    with pytest.raises(BadInput, match="Hugging Face"):  # the tests are offline
        runs.fetch(hub_id)
    assert runs.place_for_answers(hub_id).parts[:2] == ("runs", "asked")


def test_mmalign_asks_a_model_that_is_no_run(world, tmp_path):
    """It asked all questions and then failed to write the answers."""
    model = build_internvl2(tmp_path)
    before = sorted(path.name for path in model.iterdir())
    done = run_here("mmalign.py", model, "--data", world / "test", "--n", 2, cwd=tmp_path)
    assert done.returncode == 0 and "relation" in done.stdout, done.stderr
    assert sorted(path.name for path in model.iterdir()) == before
    assert len(list((tmp_path / "runs/asked").glob("*/answers-MMAlign.jsonl"))) == 1


def test_what_an_earlier_run_answered_is_not_this_run_s(world, start, tmp_path):
    """Kept answers were found by name alone, and scored as those of the run that took its place."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "answers-mean.jsonl").write_text(json.dumps({"text": "old"}) + "\n")
    done = run_here("train.py", "--init", start / "audio", "--data", world / "vision-audio",
                    "--max-steps", 1, "--out", out, cwd=tmp_path)
    assert done.returncode == 0 and not (out / "answers-mean.jsonl").exists(), done.stderr
    log = json.loads((out / "log.jsonl").read_text())
    assert "longest_save_s" in log["time"]


def test_a_typed_question_that_is_too_long_to_say_is_one_line(world, start, tmp_path):
    """It was a traceback."""
    picture = next((world / "test/images").iterdir())
    done = run_here("eval.py", start / "audio", "--image", picture,
                    "--question", "what color " * 60, cwd=tmp_path)
    assert done.returncode == 1 and "30 s" in done.stderr and done.stderr.count("\n") == 1
