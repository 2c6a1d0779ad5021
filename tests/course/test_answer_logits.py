"""Grades `answer_logits` (model.py). What `decode_query` returns is given."""

import pytest
import torch
from tiny import same, tiny_model

from data import IGNORE
from model import Prefix

LABELS = torch.tensor([[IGNORE, IGNORE, IGNORE, 5, 6, IGNORE, IGNORE],
                       [IGNORE, IGNORE, 7, 0, 9, 6, IGNORE],
                       [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 5, 6]])
PLACES = [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (2, 5)]  # one before each label


@pytest.fixture
def ollm():
    """A model whose `decode_query` gives the states of `ollm.hidden`, whatever was asked."""
    ollm = tiny_model().requires_grad_(False)
    ollm.hidden = torch.randn(3, 7, 128, dtype=torch.float64).requires_grad_()
    ollm.calls = []

    def decode_query(prefix, query, audio_tokens=None):
        ollm.calls.append(audio_tokens)
        return ollm.hidden, prefix

    ollm.decode_query = decode_query
    return ollm


def ask(ollm, audio_tokens=None):
    """Returns what answer_logits does of a query with LABELS."""
    mask = torch.ones_like(LABELS, dtype=torch.bool)
    query = {"ids": LABELS.clamp(min=0), "mask": mask, "labels": LABELS.clone()}
    prefix = Prefix(None, torch.ones(3, 4, dtype=torch.bool), 0)
    return ollm.answer_logits(prefix, query, audio_tokens)


def test_labels(ollm):
    _, labels = ask(ollm)
    assert labels.tolist() == [5, 6, 7, 0, 9, 6, 5, 6], (
        "the labels are all that are not IGNORE, row by row, the end mark among them")


def test_logits(ollm):
    logits, _ = ask(ollm)
    states = torch.stack([ollm.hidden[place] for place in PLACES])  # (N, D)
    same(logits, ollm.lvlm.lm_head(states),
         "logits are taken one position before each label: the last prompt position predicts the "
         "first token; rows stand one after another")
    assert logits.requires_grad, "the hidden states need a gradient: something was detached"


def test_the_head_is_applied_to_answers_alone(ollm):
    sizes = []
    ollm.lvlm.lm_head.register_forward_pre_hook(
        lambda head, inputs: sizes.append(inputs[0].numel() // inputs[0].size(-1)))
    ask(ollm)
    assert sum(sizes) <= len(PLACES), (
        f"{len(PLACES)} positions predict an answer's token, the head was applied to {sum(sizes)}: "
        "choose the positions first")


def test_speech_is_passed_on(ollm):
    audio_tokens = torch.randn(3, 2, 128, dtype=torch.float64)
    ask(ollm, audio_tokens)
    assert len(ollm.calls) == 1, "the query is read once"
    assert ollm.calls[0] is audio_tokens, "a spoken question's audio tokens go to decode_query"
