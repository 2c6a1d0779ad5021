"""A folder with the base's own answers: whole, right, and the same after an interruption."""

import json

import pytest
from conftest import run_here

import data
from model import OLLM


@pytest.mark.slow
def test_a_folder_is_answered_by_the_base_and_trained_on(world, start, tmp_path):
    command = ("analysis.relabel", start / "base", world / "vision-audio", "--batch", 30)
    done = run_here(*command, "--out", tmp_path / "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    new = [json.loads(line) for line in open(tmp_path / "whole/samples.jsonl")]
    old = [json.loads(line) for line in open(world / "vision-audio/samples.jsonl")]
    left_out = [json.loads(line) for line in open(tmp_path / "whole/skipped.jsonl")]
    assert len(new) + len(left_out) == len(old) and len(new) > 20

    # Each has the answer that the base gives to it alone; all else is as it was.
    ollm = OLLM.load(start / "base").eval()
    samples = data.Samples(world / "vision-audio", ollm.settings, ("question",))
    by_id = {row["id"]: (i, row) for i, row in enumerate(old)}
    for row in new[:5]:
        i, before = by_id[row["id"]]
        answer, = ollm.answer([samples[i]], ("text",), max_new_tokens=256)["text"]
        assert row["answer"] == answer
        assert {**row, "answer": 0} == {**before, "answer": 0}
    again = data.Samples(tmp_path / "whole", ollm.settings)
    assert len(again[0]["wave"]) > 1000 and "pixels" in again[0]

    # Cut off in the middle of a line, it ends with the same bytes.
    (tmp_path / "half").mkdir()
    whole = (tmp_path / "whole/answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half/answers.begun.jsonl").write_text("".join(whole[:41]) + whole[41][:3])
    assert run_here(*command, "--out", tmp_path / "half", cwd=tmp_path).returncode == 0
    for name in ("samples.jsonl", "answers.jsonl", "settings.json"):
        assert ((tmp_path / "half" / name).read_bytes()
                == (tmp_path / "whole" / name).read_bytes())
