"""Muon against torch's own, which computes in bfloat16, and against the singular values."""

import pytest
import torch

from world.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (128, 128)])
def test_orthogonalized_directions_stay_and_sizes_become_one(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    sizes = torch.linspace(1, 5, u.size(1), dtype=torch.float64)
    one, = orthogonalize((u * sizes @ v)[None])
    inside = u.T @ one @ v.T  # diagonal, if the singular vectors stayed
    assert (inside - inside.diag().diag()).abs().max() < 1e-10
    assert 0.6 < inside.diag().min() and inside.diag().max() < 1.3


def test_matrices_move_as_torch_s_muon_moves_them_and_the_rest_as_adamw():
    torch.manual_seed(0)
    start = [torch.randn(96, 64), torch.randn(64, 96), torch.randn(5)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.0}
    optimizers = [Muon(ours, **options), torch.optim.AdamW(theirs[2:], **options),
                  torch.optim.Muon(theirs[:2], adjust_lr_fn="match_rms_adamw", **options)]
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    for p, q, first in zip(ours, theirs, start):
        moved = (q - first).norm()
        assert moved > 0.01 and (p - q).norm() < 0.02 * moved, "bfloat16 rounds to 3 digits"
