"""`import semilearn` works with timm 1.x, and its ViT can be built and run."""

import torch
from semilearn import get_net_builder

net = get_net_builder("vit_tiny_patch2_32", False)(num_classes=3)
logits = net(torch.zeros(2, 3, 32, 32))["logits"]
assert logits.shape == (2, 3), f"expected logits of shape (2, 3), got {tuple(logits.shape)}"
