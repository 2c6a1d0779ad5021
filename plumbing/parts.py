"""The loss of many answers at once: a part of the logits at a time.

In float32, the loss takes some 29 bytes for each logit, and an answer token of InternVL2-1B has
151,655 logits. There is nothing to run here; `forward` in model.py takes its loss through it.
Letters in shape comments: N answer tokens in the batch, V vocabulary, D width of the LLM.
"""

import torch
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25  # at once in memory, about 1 GB in the loss


def loss_in_parts(loss, head, student, teacher, labels, alpha, temperature, n_tokens=None):
    """Returns what `loss` gives of the logits head(states), never more than LOGITS at once.

    loss              `self_kd_loss` of loss.py
    student, teacher  (N, D) states that the head takes; teacher is None if alpha is 0
    If there is more than one part, the backward pass computes each part's logits again.
    """
    if n_tokens is None:
        n_tokens = max(1, len(labels))

    def loss_of(student, teacher, labels):
        with torch.no_grad():
            teacher = None if teacher is None else head(teacher)  # (n, V)
        return loss(head(student), teacher, labels, alpha, temperature, n_tokens)

    size = max(1, LOGITS // head.out_features)  # tokens of a part
    if len(labels) <= size:
        return loss_of(student, teacher, labels)
    sums = 0
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        states = student[part], None if teacher is None else teacher[part]
        terms = checkpoint(loss_of, *states, labels[part], use_reentrant=False)
        sums = sums + torch.stack(terms)  # (3,)
    return sums.unbind()
