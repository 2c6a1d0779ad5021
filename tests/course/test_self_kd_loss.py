"""Grades `self_kd_loss` (loss.py): the textbook formula, token by token and word by word."""

import pytest
import torch

from loss import self_kd_loss

N, V = 7, 50


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
                        for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def textbook(student, teacher, labels, temperature=1.0):
    """Returns (kl, ce) of float64 logits."""
    kl = ce = 0.0
    for s, t, y in zip(student, teacher, labels):
        p_t = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        p_s = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        kl += temperature**2 * sum(p * (p / q).log() for p, q in zip(p_t, p_s)) / len(labels)
        ce -= (torch.exp(s[y]) / torch.exp(s).sum()).log() / len(labels)
    return kl, ce


def same(ours, theirs, cause):
    """Fails with the likely cause unless two tensors agree: to 1e-10 if ours is in float64."""
    __tracebackhide__ = True
    rtol, atol = (1e-10, 1e-14) if ours.dtype == torch.float64 else (1e-4, 1e-6)
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol, msg=cause)


def test_cross_entropy(logits):
    student, teacher, labels = logits
    _, ce = textbook(student, teacher, labels)
    loss, kl, _ = self_kd_loss(student, None, labels, alpha=0.0)
    same(loss, ce, "at alpha 0 the loss is the mean of -log p_S(label) over the N tokens")
    assert kl == 0, "at alpha 0 there is no teacher, and the KL is reported as 0"


def test_kl(logits):
    student, teacher, labels = logits
    loss, kl, ce = self_kd_loss(student, teacher, labels, alpha=1.0)
    same(loss, textbook(student, teacher, labels)[0],
         "at alpha 1 the loss is KL(teacher || student): sum of p_T (log p_T - log p_S) over the "
         "vocabulary, mean over the N tokens (the other way round is the reverse KL)")
    assert loss == kl, "at alpha 1 the loss is the KL"
    if ce != 0:
        same(ce, textbook(student, teacher, labels)[1], "ce is 0 at alpha 1, or the right one")
    other = self_kd_loss(student, teacher, labels.flip(0), alpha=1.0)[0]
    assert other == loss, "at alpha 1 the labels do not matter"


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_the_mixture(logits, alpha):
    ours = self_kd_loss(*logits, alpha)
    kl, ce = textbook(*logits)
    same(ours[0], alpha * kl + (1 - alpha) * ce,
         "the loss is alpha * kl + (1 - alpha) * ce: is a weight swapped or forgotten?")
    same(ours[1], kl, "the second value is the KL itself, not yet weighed by alpha")
    same(ours[2], ce, "the third value is the CE itself, not yet weighed by 1 - alpha")


def test_the_temperature(logits):
    kl, ce = textbook(*logits, temperature=2.0)
    ours = self_kd_loss(*logits, 0.75, 2.0)
    same(ours[1], kl, "the temperature divides both logits, and the KL is multiplied by its square")
    same(ours[2], ce, "the temperature does not touch the CE")


def test_gradient(logits):
    student, teacher, labels = logits
    kl, ce = textbook(student, teacher, labels)
    loss = self_kd_loss(student, teacher, labels, 0.75)[0]
    theirs, = torch.autograd.grad(0.75 * kl + 0.25 * ce, student)
    ours, = torch.autograd.grad(loss, student, allow_unused=True)
    assert ours is not None, "the student's logits need a gradient: something was detached"
    same(ours.to(loss.dtype), theirs,
         "the loss is right and its gradient is not: part of it was detached")


def test_a_student_like_its_teacher(logits):
    student, _, labels = logits
    kl = self_kd_loss(student, student.detach().clone(), labels, alpha=1.0)[1]
    assert abs(kl.item()) < 1e-6, "where student and teacher agree the KL is 0: cross-entropy " \
        "against the teacher's distribution is not, it has the teacher's entropy, too"


def test_sure_models_give_no_nan(logits):
    student, teacher, labels = logits
    terms = self_kd_loss(student.float() * 100, teacher.float() * 100, labels, 0.5)
    assert torch.isfinite(torch.stack(terms)).all(), (
        "a probability that is rounded to 0 has no logarithm: use log_softmax")


def test_parts_of_a_batch_add_up(logits):
    student, teacher, labels = logits
    whole = self_kd_loss(student, teacher, labels, 0.75)
    parts = [self_kd_loss(student[a:b], teacher[a:b], labels[a:b], 0.75, n_tokens=N)
             for a, b in ((0, 2), (2, 7))]
    for all_at_once, first, second in zip(whole, *parts):
        same(first + second, all_at_once.double(),
             "sums over tokens are divided by n_tokens, KL and CE alike")


def test_no_answer_token(logits):
    student, teacher, labels = logits
    loss = self_kd_loss(student[:0], teacher[:0], labels[:0], 0.75, n_tokens=5)[0]
    assert loss.item() == 0, "without answer tokens the loss is 0: a mean of nothing is no number"
    gradient, = torch.autograd.grad(loss, student)  # DDP waits for every rank's
    assert gradient.abs().max() == 0


def test_half_precision(logits):
    student, teacher, labels = logits
    loss = self_kd_loss(student.bfloat16(), teacher.bfloat16(), labels, 0.5)[0]
    assert loss.dtype == torch.float32, "logits in half precision are raised to float32 first"


@pytest.mark.parametrize("alpha", [-0.25, 1.5])
def test_alpha_outside_its_range(logits, alpha):
    with pytest.raises((AssertionError, ValueError)):
        self_kd_loss(*logits, alpha=alpha)
        pytest.fail("an alpha below 0 or above 1 is refused, by an assert or a ValueError")
