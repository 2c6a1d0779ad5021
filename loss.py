"""The paper's loss: alpha * KL(teacher || student) + (1 - alpha) * CE, over the answer's tokens.

    >>> loss, kl, ce = self_kd_loss(student_logits, teacher_logits, labels, alpha=0.75)
    >>> loss, kl, ce = chunked_self_kd_loss(student_states, teacher_states, lm_head, labels, alpha=0.75)    # the same

There is nothing to run here; `python -m pytest tests/test_loss.py` compares both with the textbook formula.

Letters in shape comments: N answer tokens, V vocabulary, D width of the LLM.
"""

import torch
from torch.nn import functional as F

LOGITS_AT_ONCE = 2**25  # 128 MB in float32, of which the loss needs several copies


def self_kd_loss(student_logits, teacher_logits, labels, alpha, temperature=1.0, n_tokens=None,
                 divergence="forward"):
    """Self-Knowledge Distillation (the paper's Eq. 2, mixed with supervised fine-tuning by alpha).

    student_logits  (N, V) given the spoken question, with gradient
    teacher_logits  (N, V) given the written question, without; may be None if alpha is 0
    labels          (N,) the answer's tokens
    alpha           0: conventional supervised fine-tuning; 1: distillation alone; the paper's best is 0.75
    temperature     softens both distributions; the KL is multiplied by its square so that its gradient keeps its size
                    (Hinton et al., 2015). The paper uses none: 1
    n_tokens        what the sums over N are divided by: the number of answer tokens in the whole global batch, over all
                    micro-batches and processes, so that every token counts alike however they are dealt out. None: N
    divergence      "forward": KL(teacher || student), the paper's, which punishes what the student leaves out;
                    "reverse": KL(student || teacher), which punishes what only the student would say

    Returns (loss, kl, ce), scalars. A term of weight 0 is not computed and returned as 0. At least in float32.
    """
    assert 0 <= alpha <= 1, f"alpha is a weight between 0 and 1, not {alpha}"
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits = student_logits.to(dtype)
    n_tokens = len(labels) if n_tokens is None else n_tokens
    kl = ce = student_logits[:0].sum()  # 0 that keeps the graph whole where there is no answer token
    if alpha > 0:
        t = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)  # (N, V)
        s = F.log_softmax(student_logits / temperature, dim=-1)  # (N, V)
        p, q = (t, s) if divergence == "forward" else (s, t)
        kl = kl + temperature**2 * (p.exp() * (p - q)).sum() / n_tokens  # exactly 0 where the logits are equal
    if alpha < 1:
        ce = ce + F.cross_entropy(student_logits, labels, reduction="sum") / n_tokens
    return alpha * kl + (1 - alpha) * ce, kl, ce


def chunked_self_kd_loss(student, teacher, head, labels, alpha, temperature=1.0, n_tokens=None, divergence="forward",
                         rows=None):
    """`self_kd_loss` from hidden states: the same numbers, with never more than `rows` rows of logits in memory.

    student, teacher  (N, D) last hidden states at the positions that predict the answer; teacher None if alpha is 0
    head              the LLM's linear layer from D to V, frozen if there is more than one chunk
    rows              None: as many as LOGITS_AT_ONCE allows

    Where the vocabulary is 151,655 words, logits are by far the largest tensors of a step. Nothing comes after the
    loss, so a chunk's gradient can be taken as soon as its loss is there, and its logits dropped before the next chunk:
    no product is computed twice, as it would be with checkpointing.
    """
    n_tokens = len(labels) if n_tokens is None else n_tokens
    rows = rows or max(1, LOGITS_AT_ONCE // head.out_features)
    if len(labels) <= rows:
        return self_kd_loss(head(student), None if teacher is None else head(teacher), labels, alpha, temperature,
                            n_tokens, divergence)
    assert not head.weight.requires_grad, "a head that is trained itself takes its logits in one chunk"
    cut = student.detach().requires_grad_()  # (N, D): the graph is cut in two here, and its later half differentiated
    sums = [0.0, 0.0, 0.0]
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        terms = self_kd_loss(head(cut[chunk]), None if teacher is None else head(teacher[chunk]), labels[chunk], alpha,
                             temperature, n_tokens, divergence)
        terms[0].backward()
        sums = [s + term.detach() for s, term in zip(sums, terms)]
    loss = sums[0] + ((student - cut.detach()) * cut.grad).sum()  # + 0, whose gradient is the one just taken
    return loss, *sums[1:]
