"""What a policy trains: LoRA adapters on a frozen model (Table 10), or all but its first blocks.

The paper's adapters have rank 64 and alpha 128, on the q, k, v and output projections. Here q, k
and v are one layer with one adapter. A model's blocks must have attn.qkv and attn.out.
"""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * up(down(x)). `up` starts at zero, the layer unchanged."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scale = alpha / rank
        self.enabled = True

    def forward(self, x):
        out = self.linear(x)
        return out + (x @ self.down.T) @ self.up.T * self.scale if self.enabled else out


def add_lora(model, rank, alpha=None, skip=0):
    """Freezes `model` and adds trainable adapters to its attention, in place.

    alpha: 2 rank unless given (Table 10). The first `skip` blocks get none, so that they can be
    shared with the reference. ValueError unless a block is left."""
    blocks = blocks_after(model, skip)
    model.requires_grad_(False)
    for block in blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank, alpha or 2 * rank)
        block.attn.out = LoRALinear(block.attn.out, rank, alpha or 2 * rank)
    return model


def freeze_trunk(model, skip):
    """Freezes a VideoTransformer up to its first `skip` blocks, so that these can be shared with
    the reference; 0 freezes nothing. ValueError unless a block is left."""
    blocks = blocks_after(model, skip)
    if skip:
        model.requires_grad_(False)
        for part in (*blocks, model.modulation, model.patch_out):
            part.requires_grad_(True)
    return model


def blocks_after(model, skip):
    """The blocks of `model` but the first `skip`. ValueError unless one is left."""
    last = len(model.blocks) - 1
    if not 0 <= skip <= last:
        raise ValueError(f"{skip}: this model has {last + 1} blocks, so 0 to {last}")
    return model.blocks[skip:]


@contextmanager
def lora_disabled(model):
    """Inside, `model` is its own reference: the adapters are off."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model):
    """A copy of `model` without adapters and with the same outputs, to save and to sample from."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name in ("qkv", "out"):
            layer = getattr(block.attn, name)
            if isinstance(layer, LoRALinear):
                layer.linear.weight += layer.scale * layer.up @ layer.down
                setattr(block.attn, name, layer.linear)
    return model


def merged_state_dict(model):
    """The state dict of `model` without adapters."""
    return merge_lora(model).state_dict()
