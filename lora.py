"""LoRA: small trainable adapters on the attention of a frozen model (paper, Table 10).

There with rank 64 and alpha 128, on the q, k, v and output projections. Here q, k and v are one layer and have one
adapter. Nothing here knows a model class but that its blocks have attn.qkv and attn.out.
"""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn

from runtime.cli import BadInput


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * up(down(x)). `up` starts at zero, so step 0 is the frozen layer exactly."""

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

    def merged(self):
        """The plain linear layer with the same outputs."""
        with torch.no_grad():
            self.linear.weight += self.scale * self.up @ self.down
        return self.linear


def add_lora(model, rank, alpha=None, skip=0):
    """Freezes `model` and adds trainable adapters to its attention, in place; alpha: 2 rank unless given (Table 10).
    The first `skip` blocks stay without: a trunk to share. BadInput outside 0..depth - 1."""
    if not 0 <= skip < len(model.blocks):
        raise BadInput(
            f"--freeze {skip}: this model has {len(model.blocks)} blocks, so 0 to {len(model.blocks) - 1}"
        )
    model.requires_grad_(False)
    for block in model.blocks[skip:]:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank, alpha or 2 * rank)
        block.attn.out = LoRALinear(block.attn.out, rank, alpha or 2 * rank)
    return model


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


def merge_lora(model):
    """A copy of `model` without adapters and with the same outputs, to save and to sample from."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name in ("qkv", "out"):
            layer = getattr(block.attn, name)
            if isinstance(layer, LoRALinear):
                setattr(block.attn, name, layer.merged())
    return model


def merged_state_dict(model):
    """The state dict of `model` without adapters."""
    return merge_lora(model).state_dict()
