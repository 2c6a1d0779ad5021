"""README's first picture: it is drawn, and its dotted line is what fixed answers score."""

import json

import pytest
from PIL import Image

from analysis import first_picture


def test_the_picture_is_drawn_from_a_sample_and_four_answers(world, tmp_path):
    where = world / "test/samples.jsonl"
    row = json.loads(where.read_text().splitlines()[0])
    answers, bars = [row["answer"], "so", "", "no"], [[90, 80], [3], [4], [5]]
    first_picture.draw({**row, "where": f"{where}:1"}, answers, bars, 34, tmp_path / "first.png")
    assert Image.open(tmp_path / "first.png").height > 300


def test_the_best_fixed_answer_is_the_most_frequent_label_of_each_question_type():
    asked = [{"kind": "color", "question": "?", "label": label} for label in ("red", "red", "blue")]
    asked.append({"kind": "count", "question": "?", "label": "two"})
    assert first_picture.score_fixed_answers(asked) == pytest.approx(100 * (2 / 3 + 1) / 2)
