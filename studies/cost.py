"""What a training will take: python train.py --plan 8 --algo pretrain --preset large --fsdp

The model is built on torch's meta device, whose tensors have shapes and no memory. The rest are
formulas for float32, with width d and N tokens a clip (words and patches):

    FLOPs          forward, a clip: in each block 24 d^2 + 4 N d a token and 12 d^2 for its
                   modulation, and 4 d C (patch volume) a token in the two patch layers. Backward:
                   twice that for trained weights, once where the gradient only passes (LoRA), none
                   in a frozen trunk. dpo adds the reference's forward, of a shared trunk once.
    weights        4 bytes each; in dpo the reference's as well
    gradients      4 bytes each that is trained
    optimiser      8 bytes each that is trained, AdamW's two moments; 12 with --ema
    gathered       --fsdp divides the three above by the processes, but holds weights and gradients
                   of two blocks and of all outside the blocks whole
    activations    SAVED d floats a token and block for backward; with gradient checkpointing d
                   floats, the block's input, and SAVED d of one block

Left out: what the allocator wastes, workspaces of kernels, and the clips and noise of a batch.
"""

import math

import torch

from lora import add_lora, freeze_trunk
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
    """The model on the meta device, with what will not be trained frozen."""
    if settings.algo == "pretrain":
        config = preset(settings.preset, settings.size)
    else:
        config = load_velocity(settings.init)[0].config
    with torch.device("meta"):
        model = VideoTransformer(config)
    if settings.algo == "pretrain":
        return model
    try:
        if settings.lora_rank:
            return add_lora(model, settings.lora_rank, skip=settings.freeze)
        return freeze_trunk(model, settings.freeze)
    except ValueError as error:
        raise BadInput(f"--freeze {error}") from None


def step_flops(config, settings):
    """FLOPs of one step, all processes together."""
    d, n = config.dim, tokens(config)
    block = n * (24 * d**2 + 4 * n * d) + 12 * d**2
    patches = math.prod(config.grid) * 4 * d * config.channels * math.prod(config.patch)
    whole = config.depth * block + patches
    if settings.algo == "pretrain":
        return settings.batch * 3 * whole
    tail = whole
    if settings.freeze:
        tail -= settings.freeze * block + patches / 2
    reference = tail if settings.algo == "dpo" else 0
    backward = (1 if settings.lora_rank else 2) * tail
    return CLIPS[settings.algo] * settings.batch * (whole + backward + reference)


def memory(model, settings):
    """{part: bytes} in one process."""
    config = model.config
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in model.blocks[-1].parameters())
    blocks = sum(any(p.requires_grad for p in block.parameters()) for block in model.blocks)
    share = settings.plan if settings.fsdp else 1
    clips = CLIPS[settings.algo] * settings.batch / settings.plan / settings.accum
    floats = clips * tokens(config) * config.dim
    fixed = {
        "weights": 4 * every / share + 4 * every * (settings.algo == "dpo"),
        "gradients": 4 * trained / share,
        "optimiser": (12 if settings.ema else 8) * trained / share,
        "gathered": 8 * (every - (config.depth - 2) * block) if settings.fsdp else 0,
    }
    stored = {
        "activations": 4 * floats * SAVED * blocks,
        "activations, checkpointed": 4 * floats * (blocks + SAVED),
    }
    totals = {f"total, {name}": sum(fixed.values()) + size for name, size in stored.items()}
    return fixed | stored | totals


def plan(settings):
    """Lines: what `settings` takes on settings.plan processes of settings.flops FLOP/s each. Sizes
    are those of --preset, or of the model --init. ValueError for an algorithm that is not
    planned."""
    if settings.algo not in CLIPS:
        raise BadInput(f"--plan: knows {', '.join(CLIPS)}, not --algo {settings.algo}")
    model = planned_model(settings)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = step_flops(model.config, settings)
    hours = 1000 * flops / settings.plan / settings.flops / 3600
    way = "FSDP" if settings.fsdp else "DDP" if settings.plan > 1 else "alone"
    lines = [
        f"{settings.algo}: {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, "
        f"{model.config.depth} blocks, {tokens(model.config)} tokens a clip",
        f"a step: {CLIPS[settings.algo] * settings.batch} clips, {flops:.3g} FLOPs",
        f"memory of each of {settings.plan} ({way}; GiB):",
    ]
    lines += [f"  {name:32}{size / 2**30:8.2f}" for name, size in memory(model, settings).items()]
    rate = f"1,000 steps at {settings.flops:.3g} FLOP/s each"
    return [*lines, f"{rate}: {hours:.2f} hours; checkpointing adds a third"]
