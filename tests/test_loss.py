"""The loss where words are ruled out; the rest is course/test_self_kd_loss.py."""

import math

import pytest
import torch

from loss import self_kd_loss
from plumbing import parts

N, V = 7, 50


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
                        for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def test_what_the_teacher_rules_out_counts_nothing(logits):
    """0 times -inf is NaN, which F.kl_div gives."""
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


@pytest.mark.parametrize("n", [0, 1, 7, 8])
@pytest.mark.parametrize("alpha", [0, 0.75, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_in_parts_is_the_loss(n, alpha, temperature, monkeypatch):
    """Value and gradient, whether the answers make one part or several (here of three tokens)."""
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=False).double()
    states = torch.randn(2, n, 5, dtype=torch.float64)
    labels = torch.randint(11, (n,))
    monkeypatch.setattr(parts, "LOGITS", 3 * 11)
    results = []
    for in_parts in (False, True):
        student, teacher = states[0].clone().requires_grad_(), states[1] if alpha else None
        if in_parts:
            terms = parts.loss_in_parts(self_kd_loss, head, student, teacher, labels, alpha,
                                        temperature)
        else:
            teacher = None if teacher is None else head(teacher).detach()
            terms = self_kd_loss(head(student), teacher, labels, alpha, temperature)
        terms[0].backward()
        results.append((*terms, student.grad))
    for plain, in_parts in zip(*results):
        torch.testing.assert_close(in_parts, plain, rtol=1e-12, atol=1e-12)
    assert n == 0 or results[0][0] > 0 and results[0][-1].norm() > 0


def test_logits_of_many_answers_are_never_there_at_once(monkeypatch):
    monkeypatch.setattr(parts, "LOGITS", 3 * 11)
    head, sizes = torch.nn.Linear(5, 11, bias=False), []
    head.register_forward_pre_hook(lambda head, inputs: sizes.append(len(inputs[0])))
    student = torch.randn(8, 5, requires_grad=True)
    loss = parts.loss_in_parts(self_kd_loss, head, student, torch.randn(8, 5),
                               torch.randint(11, (8,)), 0.75, 1.0)
    loss[0].backward()
    assert max(sizes) == 3 and len(sizes) == 4 * 3
