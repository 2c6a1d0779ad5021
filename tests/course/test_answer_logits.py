"""Grades `answer_logits` (model.py). What `decode_query` returns is given."""

from contextlib import nullcontext

import pytest
import torch
from tiny import same, tiny_model, untouched

from data import IGNORE
from model import Prefix

X = IGNORE
LABELS = torch.tensor([[X, X, X, 5, 6, X, X], [X, X, 7, 0, 9, 6, X], [X, X, X, X, X, 5, 6]])
PLACES = [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (2, 5)]  # one before each label


@pytest.fixture
def ollm():
    """A model whose `decode_query` gives the states of `ollm.hidden`, whatever was asked."""
    ollm = tiny_model()
    ollm.hidden = torch.randn(3, 7, 128, dtype=torch.float64).requires_grad_()
    ollm.calls = []

    def decode_query(prefix, query, audio_tokens=None):
        ollm.calls.append(audio_tokens)
        return ollm.hidden.to(ollm.lvlm.dtype) * 1, prefix

    ollm.decode_query = decode_query
    return ollm


def ask(ollm, audio_tokens=None, labels=LABELS, guard=nullcontext):
    """Returns what answer_logits does of a query with these labels."""
    __tracebackhide__ = True
    query = {"ids": labels.clamp(min=0), "mask": labels > -200, "labels": labels.clone()}
    prefix = Prefix(None, torch.ones(3, 4, dtype=torch.bool), 0)
    with guard((prefix, query, ollm.hidden)):
        return ollm.answer_logits(prefix, query, audio_tokens)


def test_labels(ollm):
    assert ask(ollm)[1].tolist() == [5, 6, 7, 0, 9, 6, 5, 6], (
        "the labels are all that are not IGNORE, row by row, the end mark among them")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits(ollm, dtype):
    ollm.lvlm.to(dtype)
    states = torch.stack([ollm.hidden[place] for place in PLACES]).to(dtype)  # (N, D)
    tolerance = 1e-5 if dtype == torch.float64 else 0.02
    same(ask(ollm)[0], ollm.lvlm.lm_head(states),
         "logits are taken one position before each label: the last prompt position predicts the "
         "first token; rows stand one after another", tolerance, tolerance)


def test_gradients(ollm):
    logits, _ = ask(ollm)
    assert logits.requires_grad, "the hidden states need a gradient: something was detached"
    logits.sum().backward()
    assert ollm.hidden.grad is not None, "the states need a gradient: something was detached"
    places = ollm.hidden.grad.abs().sum(-1).nonzero().tolist()
    assert places == [[*place] for place in PLACES], "every position's state learns"
    assert ollm.lvlm.lm_head.weight.grad is not None, "the base's head learns, too"


def test_the_head_is_applied_to_answers_alone(ollm):
    sizes = []
    ollm.lvlm.lm_head.register_forward_pre_hook(
        lambda head, inputs: sizes.append(inputs[0].numel() // inputs[0].size(-1)))
    ask(ollm)
    assert sum(sizes) <= len(PLACES), (
        f"{len(PLACES)} positions predict an answer's token, the head was applied to {sum(sizes)}: "
        "choose the positions first")


def test_another_head_may_be_given(ollm):
    mask = torch.ones_like(LABELS, dtype=torch.bool)
    query = {"ids": LABELS.clamp(min=0), "mask": mask, "labels": LABELS.clone()}
    prefix = Prefix(None, torch.ones(3, 4, dtype=torch.bool), 0)
    states, _ = ollm.answer_logits(prefix, query, head=torch.nn.Identity())
    same(states, torch.stack([ollm.hidden[place] for place in PLACES]),
         "head=nn.Identity() gives the states that the LLM's head would take")


def test_speech_is_passed_on(ollm):
    audio_tokens = torch.randn(3, 2, 128, dtype=torch.float64)
    ask(ollm, audio_tokens)
    assert len(ollm.calls) == 1 and ollm.calls[0] is audio_tokens, (
        "the query is read once, and a spoken question's audio tokens go to decode_query")


def test_no_answer_token(ollm):
    logits, labels = ask(ollm, labels=torch.full_like(LABELS, IGNORE))
    assert logits.shape == (0, ollm.lvlm.lm_head.out_features) and labels.shape == (0,), (
        "a process may have no answer token: logits (0, V) and labels (0,)")
    assert logits.requires_grad, "also of no token the loss needs a gradient: DDP waits for it"


def test_its_arguments_stay(ollm):
    ask(ollm, guard=untouched)
