"""Grades `self_kd_loss` (loss.py): the textbook formula, token by token."""

import pytest
import torch
from tiny import same, untouched

from loss import self_kd_loss

N, V = 7, 50


@pytest.fixture
def logits():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, N, V, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.tensor([0, 3, 49, 0, 17, 5, 1])


def textbook(student, teacher, labels, temperature=1.0):
    """Returns (kl, ce) of float64 logits."""
    kl = ce = 0.0
    for s, t, y in zip(student, teacher, labels):
        p_t = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        p_s = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        kl += temperature**2 * (p_t * (p_t / p_s).log()).sum() / len(labels)
        ce -= (torch.exp(s[y]) / torch.exp(s).sum()).log() / len(labels)
    return kl, ce


def check(ours, theirs, cause):
    """Fails with the likely cause unless two tensors agree: to 1e-10 if ours is in float64."""
    __tracebackhide__ = True
    assert isinstance(ours, torch.Tensor), "three tensors are returned"
    same(ours, theirs, cause, *((1e-10, 1e-14) if ours.dtype == torch.float64 else (1e-4, 1e-6)))


def test_cross_entropy(logits):
    loss, kl, ce = self_kd_loss(logits[0], None, logits[2], alpha=0.0)
    check(loss, textbook(*logits)[1], "at alpha 0 the loss is the mean of -log p_S(label) over N")
    assert loss == ce and kl.item() == 0, "at alpha 0 the loss is the CE, and the KL reported as 0"


def test_kl(logits):
    student, teacher, labels = logits
    loss, kl, ce = self_kd_loss(student, teacher, labels, alpha=1.0)
    check(loss, textbook(*logits)[0],
          "at alpha 1 the loss is KL(teacher || student): sum of p_T (log p_T - log p_S) over the "
          "vocabulary, mean over the N tokens (the other way round is the reverse KL)")
    check(ce, textbook(*logits)[1] * (ce != 0), "ce is 0 at alpha 1, or the right one")
    other = self_kd_loss(student, teacher, labels.flip(0), alpha=1.0)[0]
    assert loss == kl == other, "at alpha 1 the loss is the KL, and the labels do not matter"


@pytest.mark.parametrize("alpha, temperature", [(0.25, 1.0), (0.9, 2.0), (0.1, 0.5)])
def test_the_mixture(logits, alpha, temperature):
    kl, ce = textbook(*logits, temperature)
    loss, our_kl, our_ce = self_kd_loss(*logits, alpha, temperature)
    check(our_kl, kl, "the second value is the KL itself, not yet weighed by alpha. The "
          "temperature divides both logits, and the KL is multiplied by its square")
    check(our_ce, ce, "the third value is the CE itself, not weighed, not softened")
    check(loss, alpha * kl + (1 - alpha) * ce, "the loss is alpha * kl + (1 - alpha) * ce")


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_gradient(logits, alpha):
    kl, ce = textbook(*logits, temperature=2.0)
    theirs, = torch.autograd.grad(alpha * kl + (1 - alpha) * ce, logits[0])
    loss = self_kd_loss(*logits, alpha, 2.0)[0]
    ours, = torch.autograd.grad(loss, logits[0], allow_unused=True)
    assert ours is not None, "the student's logits need a gradient: something was detached"
    check(ours.to(loss.dtype), theirs, "the gradient is wrong: part of the loss was detached")


def test_sure_models(logits):
    student, teacher, labels = logits
    kl = self_kd_loss(student, student.detach().clone(), labels, alpha=1.0)[1]
    assert abs(kl.item()) < 1e-6, (
        "where both agree the KL is 0: the teacher's own entropy is no part of it")
    terms = self_kd_loss(student.float() * 100, teacher.float() * 100, labels, 0.5)
    gradient, = torch.autograd.grad(terms[0], student)
    assert torch.stack(terms).isfinite().all() and gradient.isfinite().all(), (
        "a probability that is rounded to 0 has no logarithm: use log_softmax")


def test_parts_of_a_batch_add_up(logits):
    student, teacher, labels = logits
    parts = [self_kd_loss(student[a:b], teacher[a:b], labels[a:b], 0.75, n_tokens=float(N))
             for a, b in ((0, 2), (2, 7))]
    for whole, first, second in zip(self_kd_loss(*logits, 0.75), *parts):
        check(first + second, whole.double(), "sums are divided by n_tokens, KL and CE alike")


@pytest.mark.parametrize("n_tokens", [5, None])
def test_no_answer_token(logits, n_tokens):
    student, teacher, labels = logits
    terms = self_kd_loss(student[:0], teacher[:0], labels[:0], 0.75, n_tokens=n_tokens)
    gradient, = torch.autograd.grad(terms[0], student)  # DDP waits for every rank's
    assert [*map(float, terms), gradient.abs().max()] == [0] * 4, (
        "without answer tokens loss, KL and CE are 0: a mean of nothing is no number")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(logits, dtype):
    halves = [half.detach().to(dtype) for half in logits[:2]]
    kl, ce = textbook(*(half.double() for half in halves), logits[2], 2.0)
    for ours, theirs in zip(self_kd_loss(*halves, logits[2], 0.5, 2.0), ((kl + ce) / 2, kl, ce)):
        assert ours.dtype in (torch.float32, torch.float64), "the loss is in at least float32"
        check(ours.float(), theirs, "both logits are raised to float32 before anything is computed")


@pytest.mark.parametrize("alpha", [-0.25, 1.5])
def test_alpha_outside_its_range(logits, alpha):
    with pytest.raises((AssertionError, ValueError)):
        self_kd_loss(*logits, alpha=alpha)
        pytest.fail("an alpha below 0 or above 1 is refused, by an assert or a ValueError")


def test_its_arguments_stay(logits):
    with untouched(logits):
        self_kd_loss(*logits, 0.75, 2.0)
