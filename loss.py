"""The paper's loss: alpha * KL(teacher || student) + (1 - alpha) * CE, over the answer's tokens.

    >>> loss, kl, ce = self_kd_loss(student_logits, teacher_logits, labels, alpha=0.75)

There is nothing to run here; `python -m pytest tests/test_loss.py` compares it with the textbook formula.

Letters in shape comments: N answer tokens, V vocabulary.
"""

import torch
from torch.nn import functional as F


def self_kd_loss(student_logits, teacher_logits, labels, alpha, temperature=1.0, n_tokens=None):
    """Self-Knowledge Distillation (the paper's Eq. 2, mixed with supervised fine-tuning by alpha).

    student_logits  (N, V) given the spoken question, with gradient
    teacher_logits  (N, V) given the written question, without; may be None if alpha is 0
    labels          (N,) the answer's tokens
    alpha           0: conventional supervised fine-tuning; 1: distillation alone; the paper's best is 0.75
    temperature     softens both distributions; the KL is multiplied by its square so that its gradient keeps its size
                    (Hinton et al., 2015). The paper uses none: 1
    n_tokens        what the sums over N are divided by: the number of answer tokens in the whole global batch, over all
                    micro-batches and processes, so that every token counts alike however they are dealt out. None: N

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
        kl = kl + temperature**2 * (t.exp() * (t - s)).sum() / n_tokens  # exactly 0 where the logits are equal
    if alpha < 1:
        ce = ce + F.cross_entropy(student_logits, labels, reduction="sum") / n_tokens
    return alpha * kl + (1 - alpha) * ce, kl, ce
