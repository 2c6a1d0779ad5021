"""Scores of the built-in world's answers: correctness, answer type, style.

There is nothing to run here; eval.py uses it. `python -m pytest tests/test_eval.py` tries answers
that might fool it.
"""

import re
import statistics

from plumbing.files import at
from world import shapes

OBJECT = re.compile(rf"\b({'|'.join(shapes.COLORS)}) ({'|'.join(shapes.SHAPES)})\b")


# ---- one answer ----------------------------------------------------------------------------------


def score_answer(sample, answer):
    """Returns the score of an answer to a built-in question, from 0 to 1.

    An answer is right if it has exactly one word of its question's class, the right one, once an
    exact echo of the question is taken away. A description counts by F1 over (colour, shape) pairs.
    """
    kind, label = sample["kind"], sample["label"]
    answer = answer.lower().replace(sample["question"], " ")  # an echo answers nothing
    if kind in shapes.CLASSES:
        words = re.findall(rf"\b(?:{'|'.join(shapes.CLASSES[kind])})\b", answer)
        return float(words == [label])

    # A description: F1 of the named objects; 0 if more are named than a picture can hold.
    named, true = OBJECT.findall(answer), OBJECT.findall(label)
    if len(named) > len(shapes.PLACES):
        return 0.0
    return 2 * len(set(named) & set(true)) / (len(named) + len(true))


def has_answer_type(sample, answer):
    """Tells whether an answer has a word of the class that its question asks for.

    After alignment many have none: the model repeats or describes instead of answering.
    """
    kind = sample["kind"]
    if kind not in shapes.CLASSES:
        return bool(OBJECT.search(answer))
    return bool(re.search(rf"\b(?:{'|'.join(shapes.CLASSES[kind])})\b", answer))


def is_in_base_style(sample, answer):
    """Tells whether an answer is worded as the base words its own (world/shapes.py)."""
    kind, thing = sample["kind"], rf"a {OBJECT.pattern}"
    told = "|".join(shapes.CLASSES.get(kind, [rf"{thing}(?: and {thing})*"]))
    for wording in (*shapes.ANSWERS[kind], *shapes.NO_ANSWERS):
        pattern = wording.replace("{x}", r"[a-z -]+").replace("{y}", f"(?:{told})")
        if re.fullmatch(pattern, answer.lower()):
            return True
    return False


def names_scene_content(sample, answer):
    """Tells whether an answer names a colour or shape of the picture that its question does not.

    Wrong answers to speech still do, the paper finds (section 2.2).
    """
    with at(sample["where"]):
        features = {*shapes.COLORS, *shapes.SHAPES} & set(sample["scene"].split())
    return bool(features & set(answer.lower().split()) - set(sample["question"].split()))


# ---- all answers of a run ------------------------------------------------------------------------


def style_rates(rows, form):
    """Returns the percentages of answers of the asked type, and in the base's style."""
    rows = [row for row in rows if row["kind"] in shapes.KINDS]
    if not rows:
        return {}
    of_kind = [has_answer_type(row, row[form]) for row in rows]
    in_words = [is_in_base_style(row, row[form]) for row in rows]
    return {"of the asked type": 100 * statistics.fmean(of_kind),
            "in the base's style": 100 * statistics.fmean(in_words)}


def transcripts(rows):
    """Returns the percentage of exact transcripts: a mean over seen and over unseen sentences."""
    exact = {"seen": {}, "unseen": {}}
    for row in rows:
        sentences = exact["seen" if row.get("seen", True) else "unseen"]
        sentences.setdefault(row["question"], []).append(row["transcript"] == row["question"])
    return {f"transcripts exact, {name}": 100 * statistics.fmean(map(statistics.fmean, by.values()))
            for name, by in exact.items() if by}


def answer_biases(rows, form, score_row):
    """Returns two biases that the paper reports: "yes" answers, and errors that name the scene."""
    values = {}
    existence = [row for row in rows if row["kind"] == "existence"]
    if existence:
        yes = [row[form].split()[:1] == ["yes"] for row in existence]
        values["yes ratio"] = 100 * statistics.fmean(yes)
    drawn = [row for row in rows if row["kind"] in shapes.KINDS and "scene" in row]
    wrong = [row for row in drawn if not score_row(row, row[form])]
    if wrong:
        named = [names_scene_content(row, row[form]) for row in wrong]
        values["wrong, names what is there"] = 100 * statistics.fmean(named)
    return values
