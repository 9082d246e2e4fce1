"""`Swin` against timm's with the same weights; skipped where timm is not installed."""

from __future__ import annotations

import pytest
import torch

from foveate.vision import swin_from_timm

timm = pytest.importorskip("timm.models.swin_transformer")


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 160), (16, 32)])
def test_logits_and_gradients_are_equal(size):
    """At sizes that its windows divide; elsewhere it rolls before it pads."""
    torch.manual_seed(0)
    their = timm.SwinTransformer(
        img_size=size,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        num_classes=7,
        drop_path_rate=0.0,
        always_partition=size == (16, 32),
    ).eval()
    with torch.no_grad():
        for p in their.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = swin_from_timm(their.state_dict(), always_partition=size == (16, 32))
    x = torch.randn(2, 3, *size, requires_grad=True)
    logits = ours(x), their(x)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    weight = torch.randn(2, 7)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weight).sum(), x)[0] for y in logits), rtol=1e-5, atol=1e-5
    )
