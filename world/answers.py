"""What an answer in the built-in world is worth: right, of the asked kind, in whose words.

There is nothing to run here; eval.py scores by it. `python -m pytest tests/test_eval.py` tries what
might fool it.
"""

import re

from plumbing.files import at
from world import shapes

OBJECT = re.compile(rf"\b({'|'.join(shapes.COLORS)}) ({'|'.join(shapes.SHAPES)})\b")


def score_answer(sample, answer):
    """Returns how right an answer to a built-in question is, from 0 to 1."""
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


def is_of_the_kind(sample, answer):
    """Tells whether an answer has a word of the class that its question asks for.

    After alignment many have none: the model has not learnt that speech asks.
    """
    kind = sample["kind"]
    if kind not in shapes.CLASSES:
        return bool(OBJECT.search(answer))
    return bool(re.search(rf"\b(?:{'|'.join(shapes.CLASSES[kind])})\b", answer))


def is_in_the_bases_words(sample, answer):
    """Tells whether an answer is worded as the base words its own (world/shapes.py)."""
    kind, thing = sample["kind"], rf"a {OBJECT.pattern}"
    told = "|".join(shapes.CLASSES.get(kind, [rf"{thing}(?: and {thing})*"]))
    for wording in (*shapes.ANSWERS[kind], *shapes.NO_ANSWERS):
        pattern = wording.replace("{x}", r"[a-z -]+").replace("{y}", f"(?:{told})")
        if re.fullmatch(pattern, answer.lower()):
            return True
    return False


def names_what_is_there(sample, answer):
    """Tells whether an answer names a colour or shape of the picture that its question does not.

    Wrong answers to speech still do, the paper finds (section 2.2).
    """
    with at(sample["where"]):
        features = {*shapes.COLORS, *shapes.SHAPES} & set(sample["scene"].split())
    return bool(features & set(answer.lower().split()) - set(sample["question"].split()))
