"""Grades all parts together: two steps of each stage with a few samples, answers, and a resume."""

import argparse
import sys

import pytest

import eval as evaluation
import train
from world import make


def run(module, *words):
    """Runs train.py or eval.py, here, with these words on its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        module.main()


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """Makes a folder with a world of a few samples, and works there."""
    parser = argparse.ArgumentParser()
    make.add_command(parser.add_subparsers())
    words = "shapes --scenes 24 --clips 16 --n 16 --test 12"
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("world")
        patch.chdir(folder)
        make.make(parser.parse_args(words.split()))
        yield folder


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_stage_trains(stage, world):
    run(train, "--stage", stage, "--out", f"runs/shapes/{stage}-s0", "--max-steps", "2")
    assert (world / f"runs/shapes/{stage}-s0/ollm.json").exists(), f"{stage} leaves a run"


def test_it_answers(capsys):
    run(evaluation, "runs/shapes/audio-text-s0", "runs/shapes/vision-audio-s0", "--n", "6")
    assert "KD 0.75" in capsys.readouterr().out, "eval.py prints a table"


def test_it_goes_on_after_an_interruption(world, monkeypatch):
    words = ("--max-steps", "2", "--save-every", "1", "--out", "runs/again")
    forward_backward, calls = train.forward_backward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward_backward(*arguments)

    monkeypatch.setattr(train, "forward_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(train, *words)
    run(train, *words)
    first, again = (world / folder / "model.safetensors" for folder in
                    ("runs/shapes/vision-audio-s0", "runs/again"))
    assert first.read_bytes() == again.read_bytes(), "a resumed training ends as one that was not"
