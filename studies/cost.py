"""What a training will take: python train.py --plan 8 --algo pretrain --preset large --fsdp

The model is built on torch's meta device, whose tensors have shapes and no memory. The rest are
formulas for float32, with width d and N tokens a clip (words and patches). Blocks that --freeze or
LoRA spares count as trained, so that a plan is an upper bound:

    FLOPs          forward, a clip: in each block 24 d^2 + 4 N d a token and 12 d^2 for its
                   modulation, and 4 d C (patch volume) a token in the two patch layers. Backward:
                   twice that. dpo adds the reference's forward.
    weights        4 bytes each; in dpo the reference's as well
    gradients      4 bytes for each weight
    optimiser      8 bytes for each weight, AdamW's two moments; 12 with --ema
    gathered       --fsdp divides the three above by the processes, but holds weights and gradients
                   of two blocks and of all outside the blocks whole
    activations    SAVED d floats a token and block for backward; with gradient checkpointing d
                   floats, the block's input, and SAVED d of one block

Left out: what the allocator wastes, workspaces of kernels, and the clips and noise of a batch.
"""

import math

import torch

from model import VideoTransformer, load_velocity
from real_data.dataset import preset
from runtime.cli import BadInput

# inputs and outputs of two norms; modulated inputs of the linear layers; q, k, v; q and k normed;
# q and k rotated; outputs of attention and its layer; hidden layer around GELU; the MLP's output
SAVED = 4 + 2 + 3 + 2 + 2 + 2 + 8 + 1
CLIPS = {"pretrain": 1, "sft": 2, "rwr": 2, "dpo": 2}  # a row of the batch


def tokens(config):
    return config.max_text + math.prod(config.grid)


def planned_model(settings):
    if settings.algo == "pretrain":
        config = preset(settings.preset, settings.size)
    else:
        config = load_velocity(settings.init)[0].config
    with torch.device("meta"):
        return VideoTransformer(config)


def step_flops(config, settings):
    """FLOPs of one step, all processes together."""
    d, n = config.dim, tokens(config)
    block = n * (24 * d**2 + 4 * n * d) + 12 * d**2
    patches = math.prod(config.grid) * 4 * d * config.channels * math.prod(config.patch)
    forwards = 4 if settings.algo == "dpo" else 3
    return CLIPS[settings.algo] * settings.batch * forwards * (config.depth * block + patches)


def memory(model, settings):
    """{part: bytes} in one process."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    share = settings.plan if settings.fsdp else 1
    clips = CLIPS[settings.algo] * settings.batch / settings.plan / settings.accum
    floats = clips * tokens(config) * config.dim
    fixed = {
        "weights": 4 * weights / share + 4 * weights * (settings.algo == "dpo"),
        "gradients": 4 * weights / share,
        "optimiser": (12 if settings.ema else 8) * weights / share,
        "gathered": 8 * (weights - (config.depth - 2) * block) if settings.fsdp else 0,
    }
    stored = {
        "activations": 4 * floats * SAVED * config.depth,
        "activations, checkpointed": 4 * floats * (config.depth + SAVED),
    }
    totals = {f"total, {name}": sum(fixed.values()) + size for name, size in stored.items()}
    return fixed | stored | totals


def plan(settings):
    """Lines: what `settings` takes on settings.plan processes of settings.flops FLOP/s each. Sizes
    are those of --preset, or of the model --init."""
    if settings.algo not in CLIPS:
        raise BadInput(f"--plan: knows {', '.join(CLIPS)}, not --algo {settings.algo}")
    model = planned_model(settings)
    weights = sum(p.numel() for p in model.parameters())
    flops = step_flops(model.config, settings)
    hours = 1000 * flops / settings.plan / settings.flops / 3600
    lines = [
        f"{settings.algo}: {weights / 1e6:.1f} M parameters, {model.config.depth} blocks, "
        f"{tokens(model.config)} tokens a clip",
        f"a step: {CLIPS[settings.algo] * settings.batch} clips, {flops:.3g} FLOPs",
        f"memory of each of {settings.plan} ({'FSDP' if settings.fsdp else 'DDP'}; GiB):",
    ]
    lines += [f"  {name:32}{size / 2**30:8.2f}" for name, size in memory(model, settings).items()]
    rate = f"1,000 steps at {settings.flops:.3g} FLOP/s each"
    return [*lines, f"{rate}: {hours:.2f} hours; checkpointing adds a third"]
