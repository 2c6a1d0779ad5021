"""Muon, the optimizer of the built-in world's first two stages.

There is nothing to run here; `train.py` uses it where a preset says so. There the LVLM
and the audio encoder are trained from scratch, and Muon needs six in ten of AdamW's steps
(docs/results.md). Real models are pretrained; for them train.py uses AdamW.
"""

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315
MOMENTUM = 0.95


def orthogonalize(matrices, steps=5):
    """Returns matrices (N, m, n) with the same singular vectors, and singular values all near 1.

    Newton and Schulz's iteration, with the coefficients of Jordan et al. (Muon, 2024): each step
    applies a polynomial to the singular values. torch.optim.Muon does so in bfloat16, which takes
    over ten times as long on a CPU without it.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT.contiguous() if is_tall else matrices  # smaller products of x with x^T
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but a matrix moves by the orthogonalized momentum of its gradients.

    All directions get updates of equal size, rare gradient directions included. The factor makes
    the updates as large as AdamW's at the same learning rate (Liu et al., 2025, arXiv 2502.16982).
    """

    @torch.no_grad()
    def step(self):
        """Updates the weights. Drops the gradients of matrices, so that AdamW skips them."""
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape move together: one large product, not many
            for p in group["params"]:
                if p.ndim == 2 and p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():
                grads = [p.grad for p in matrices]
                means = [self.state[p].setdefault("momentum", torch.zeros_like(p))
                         for p in matrices]
                torch._foreach_lerp_(means, grads, 1 - MOMENTUM)
                blended = torch.stack(torch._foreach_lerp(grads, means, MOMENTUM))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_sub_(matrices, list(orthogonalize(blended)), alpha=rate)
                for p in matrices:
                    p.grad = None
        super().step()
