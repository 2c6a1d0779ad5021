"""The loss of Self-KD (arXiv 2503.00059): alpha * KL(teacher || student) + (1 - alpha) * CE.

    loss, kl, ce = self_kd_loss(student_logits, teacher_logits, labels, alpha=0.75)

It is taken over the answer's tokens; tests/course/test_self_kd_loss.py compares it with the
formula, term by term. Letters in shape comments: N answer tokens in the batch, V vocabulary.
"""

import torch
from torch.nn import functional as F


def self_kd_loss(student_logits, teacher_logits, labels, alpha, temperature=1.0, n_tokens=None):
    """Returns (loss, kl, ce), scalars in at least float32 (the paper's Eqs. 1 to 3).

    student_logits  (N, V) given the spoken question
    teacher_logits  (N, V) given the written question, without gradient; None if alpha is 0
    labels          (N,) the answer's tokens
    alpha           0 is supervised fine-tuning, 1 is distillation alone (both in the paper's Table
                    3): the other term is 0. Of the five of its Table 5, 0.75 is best. What is not
                    from 0 to 1 is refused, by an assert or a ValueError
    temperature     softens both; its square scales the KL (Hinton et al., 2015); none in the paper
    n_tokens        what the sums over N are divided by; None means N (1 if N is 0). Training passes
                    the number of answer tokens in the global batch: every token counts the same
    """
    assert 0 <= alpha <= 1, f"alpha is a weight between 0 and 1, not {alpha}"
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits = student_logits.to(dtype)
    n_tokens = max(1, len(labels)) if n_tokens is None else n_tokens
    kl = ce = student_logits.new_zeros(())

    # Self-distillation: the student's distribution over the vocabulary should be the teacher's.
    # This is F.kl_div(student, teacher, reduction="sum", log_target=True), written out; where both
    # agree it is exactly 0. Dividing logits by the temperature shrinks the gradient by its square,
    # which the factor undoes.
    if alpha > 0:
        teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)  # (N, V)
        student = F.log_softmax(student_logits / temperature, dim=-1)  # (N, V)
        # Where the teacher's probability is 0 the term is 0 (0 log 0 = 0); else it would be NaN.
        ratio = (teacher - student).masked_fill_(teacher == -torch.inf, 0)  # (N, V)
        kl = temperature**2 * (teacher.exp() * ratio).sum() / n_tokens

    # Supervised fine-tuning: the data's answer should be likely.
    if alpha < 1:
        ce = F.cross_entropy(student_logits, labels, reduction="sum") / n_tokens

    return alpha * kl + (1 - alpha) * ce, kl, ce
