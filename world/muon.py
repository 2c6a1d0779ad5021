"""Muon, the optimizer that the built-in world starts with.

There is nothing to run here; `train.py` uses it where a preset says so. In the built-in world, the
LVLM and the audio encoder learn all they know in minutes, and with Muon they need six in ten of
AdamW's steps (docs/results.md). The paper's models come trained and use AdamW.
"""

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315
MOMENTUM = 0.95


def orthogonalize(matrix, steps=5):
    """Returns a matrix (m, n) with the same singular vectors, and singular values all near 1.

    Newton and Schulz's iteration, with the coefficients of Jordan et al. (Muon, 2024): each step
    applies a polynomial to the singular values. torch.optim.Muon does so in bfloat16, which takes
    over ten times as long on a CPU without it.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if is_tall else matrix  # the smaller products of x with its transpose
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but a matrix moves by the orthogonalized mean of its last gradients.

    So it moves as far in directions that gradients seldom point to as in others. The factor makes
    its steps as large as AdamW's, at the same learning rate (Liu et al., 2025, arXiv 2502.16982).
    """

    @torch.no_grad()
    def step(self):
        """Updates the weights. Leaves matrices without gradients, so that AdamW skips them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 2 and p.grad is not None:
                    mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - MOMENTUM)
                    update = orthogonalize(p.grad.lerp(mean, MOMENTUM))
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)
                    p.grad = None
        super().step()
