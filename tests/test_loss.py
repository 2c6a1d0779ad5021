"""The loss against the textbook formula in float64."""

import math

import pytest
import torch

from loss import chunked_self_kd_loss, self_kd_loss

N, V, D = 7, 50, 4


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def textbook(student, teacher, labels, alpha, temperature=1.0, divergence="forward"):
    """The formula, token by token and word by word."""
    kl = ce = 0.0
    for s, t, y in zip(student, teacher, labels):
        p_t = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        p_s = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        pairs = zip(p_t, p_s) if divergence == "forward" else zip(p_s, p_t)
        kl += temperature**2 * sum(p * (p / q).log() for p, q in pairs) / len(labels)
        ce -= (torch.exp(s[y]) / torch.exp(s).sum()).log() / len(labels)
    return alpha * kl + (1 - alpha) * ce, kl, ce


@pytest.mark.parametrize("alpha", [0.25, 0.75])
@pytest.mark.parametrize("temperature, divergence", [(1.0, "forward"), (2.0, "forward"), (2.0, "reverse")])
def test_textbook(logits, alpha, temperature, divergence):
    student, teacher, labels = logits
    ours = self_kd_loss(student, teacher, labels, alpha, temperature, divergence=divergence)
    theirs = textbook(student, teacher, labels, alpha, temperature, divergence)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(terms[0], student, retain_graph=True)[0] for terms in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_is_exactly_zero_when_student_equals_teacher(logits, dtype):
    student, _, labels = logits
    same = student.detach().to(dtype)
    loss, kl, _ = self_kd_loss(same, same.clone(), labels, alpha=1.0)
    assert kl.item() == 0 and loss.item() == 0


def test_alpha_0_is_cross_entropy_and_needs_no_teacher(logits):
    student, _, labels = logits
    loss, kl, ce = self_kd_loss(student, None, labels, alpha=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, labels), rtol=1e-12, atol=0)
    assert loss == ce and kl == 0


def test_alpha_1_does_not_look_at_the_labels(logits):
    student, teacher, labels = logits
    loss, kl, ce = self_kd_loss(student, teacher, labels, alpha=1.0)
    assert loss == kl == self_kd_loss(student, teacher, labels.flip(0), alpha=1.0)[0] and ce == 0


def test_parts_of_a_batch_add_up(logits):
    student, teacher, labels = logits
    whole = self_kd_loss(student, teacher, labels, 0.75)[0]
    parts = [self_kd_loss(student[a:b], teacher[a:b], labels[a:b], 0.75, n_tokens=N)[0] for a, b in ((0, 2), (2, 7))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_no_answer_token_gives_no_gradient_but_a_graph(logits):
    student, teacher, labels = logits
    loss = self_kd_loss(student[:0], teacher[:0], labels[:0], 0.75, n_tokens=5)[0]
    assert loss.item() == 0 and torch.autograd.grad(loss, student)[0].abs().max() == 0


def test_half_precision_logits_are_raised_to_float32(logits):
    student, teacher, labels = logits
    assert self_kd_loss(student.bfloat16(), teacher.bfloat16(), labels, 0.5)[0].dtype == torch.float32


def test_alpha_outside_its_range_is_refused(logits):
    with pytest.raises(AssertionError, match="between 0 and 1"):
        self_kd_loss(*logits, alpha=1.5)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 7, None])
def test_chunks_give_the_same_loss_and_gradient_and_compute_nothing_twice(alpha, rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(D, V, bias=False).double().requires_grad_(False)
    before = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    student, teacher, labels = before.tanh(), torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))
    whole = self_kd_loss(head(student), head(teacher), labels, alpha, 2.0, n_tokens=20)
    gradient, = torch.autograd.grad(whole[0], before, retain_graph=True)

    seen = []
    head.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    teacher = None if alpha == 0 else teacher
    chunked = chunked_self_kd_loss(student, teacher, head, labels, alpha, 2.0, n_tokens=20, rows=rows)
    torch.testing.assert_close(torch.stack(chunked), torch.stack(whole), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(2 * chunked[0], before)[0], 2 * gradient, rtol=1e-12, atol=1e-16)
    assert max(seen) == (rows or N) and sum(seen) == (N if teacher is None else 2 * N)


def test_chunks_are_small_where_the_vocabulary_is_large():
    head = torch.nn.Linear(1, 2**24, bias=False).requires_grad_(False)
    seen = []
    head.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    student = torch.zeros(3, 1, requires_grad=True)
    loss, _, ce = chunked_self_kd_loss(student, None, head, torch.zeros(3, dtype=torch.long), alpha=0.0)
    assert seen == [2, 1] and loss.item() == pytest.approx(24 * math.log(2)) and loss == ce


def test_a_head_that_learns_is_not_cut_into_chunks():
    head = torch.nn.Linear(D, V)
    with pytest.raises(AssertionError, match="one chunk"):
        chunked_self_kd_loss(torch.randn(N, D), None, head, torch.zeros(N, dtype=torch.long), 0.0, rows=3)
