"""The loss against the textbook formula in float64."""

import math

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


def textbook(student, teacher, labels, alpha, temperature=1.0):
    """The formula, token by token and word by word."""
    kl = ce = 0.0
    for s, t, y in zip(student, teacher, labels):
        p_t = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        p_s = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        kl += temperature**2 * sum(p * (p / q).log() for p, q in zip(p_t, p_s)) / len(labels)
        ce -= (torch.exp(s[y]) / torch.exp(s).sum()).log() / len(labels)
    return alpha * kl + (1 - alpha) * ce, kl, ce


@pytest.mark.parametrize("alpha", [0.25, 0.75])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_textbook(logits, alpha, temperature):
    student, teacher, labels = logits
    ours = self_kd_loss(student, teacher, labels, alpha, temperature)
    theirs = textbook(student, teacher, labels, alpha, temperature)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(terms[0], student, retain_graph=True)[0]
                 for terms in (ours, theirs)]
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
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, labels),
                               rtol=1e-12, atol=0)
    assert loss == ce and kl == 0


def test_alpha_1_does_not_look_at_the_labels(logits):
    student, teacher, labels = logits
    loss, kl, ce = self_kd_loss(student, teacher, labels, alpha=1.0)
    assert loss == kl == self_kd_loss(student, teacher, labels.flip(0), alpha=1.0)[0] and ce == 0


def test_parts_of_a_batch_add_up(logits):
    student, teacher, labels = logits
    whole = self_kd_loss(student, teacher, labels, 0.75)[0]
    parts = [self_kd_loss(student[a:b], teacher[a:b], labels[a:b], 0.75, n_tokens=N)[0]
             for a, b in ((0, 2), (2, 7))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_no_answer_token_gives_no_gradient_but_a_graph(logits):
    student, teacher, labels = logits
    loss = self_kd_loss(student[:0], teacher[:0], labels[:0], 0.75, n_tokens=5)[0]
    assert loss.item() == 0 and torch.autograd.grad(loss, student)[0].abs().max() == 0


def test_what_the_teacher_rules_out_counts_nothing(logits):
    """0 times -inf made it NaN, as F.kl_div does."""
    zeros, infinite = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, -torch.inf]])
    loss, kl, _ = self_kd_loss(zeros, infinite, torch.tensor([0]), 1.0)
    gradient, = torch.autograd.grad(loss, zeros)
    assert kl.item() == pytest.approx(math.log(2)) and gradient.tolist() == [[-0.5, 0.5]]

    # Ruled out almost or wholly is the same; so is a vocabulary without those words.
    student, teacher, labels = logits
    words, results = torch.tensor([3, 7]), []
    for value in (-1e4, -torch.inf):
        loss = self_kd_loss(student, teacher.index_fill(1, words, value), labels, 1.0)[0]
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)
    both = [logits.index_fill(1, words, -torch.inf) for logits in (student, teacher)]
    few = [torch.cat([logits[:, :3], logits[:, 4:7], logits[:, 8:]], 1) for logits in both]
    for temperature in (1.0, 2.0):
        losses = [self_kd_loss(*pair, labels, 1.0, temperature)[0] for pair in (both, few)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)
        assert not gradients[0][:, [3, 7]].any() and gradients[0].abs().sum() > 0


def test_half_precision_logits_are_raised_to_float32(logits):
    student, teacher, labels = logits
    assert (self_kd_loss(student.bfloat16(), teacher.bfloat16(), labels, 0.5)[0].dtype
            == torch.float32)


def test_alpha_outside_its_range_is_refused(logits):
    with pytest.raises(AssertionError, match="between 0 and 1"):
        self_kd_loss(*logits, alpha=1.5)
