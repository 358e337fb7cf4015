"""What a training will take, before it takes it: python train.py --plan 8 --algo pretrain --preset large --fsdp

Nothing is allocated: the model is built on torch's meta device, whose tensors have shapes and no memory. The rest are
formulas, with d the width, N the tokens of a clip (words and patches), and everything in float32:

    parameters     counted on the meta model; of them 18 d^2 a block: 4 attention, 8 MLP, 6 modulation
    FLOPs          (an addition is one, a multiplication another) forward, a clip: a block 24 d^2 + 4 N d a token and
                   12 d^2 for its modulation, the two patch layers 4 d C (patch volume) a token. Backward: twice that
                   for weights that are trained, once where the gradient only passes (under LoRA), never in a frozen
                   trunk. dpo adds the reference's forward, of a shared trunk only once.
    weights        4 bytes each; in dpo the reference's as well
    gradients      4 bytes each that is trained
    optimiser      8 bytes each that is trained, AdamW's two moments; and 4 for the average, with --ema
    gathered       --fsdp divides the three above by the processes, but holds whole, weights and gradients, two blocks
                   and what lies outside the blocks; and dpo's reference, which is not sharded
    activations    what backward needs: SAVED d floats a token and block; with checkpointing, where a block keeps its
                   input alone and computes the rest again, KEPT d floats, and one block's SAVED d

Left out: what the allocator wastes, workspaces of kernels, and the clips and noise of a batch.
"""

import math

import torch

from lora import add_lora, freeze_trunk
from model import VideoTransformer, load_velocity
from real_data.disk_pairs import preset
from runtime.cli import BadInput

# Two norms' inputs and outputs, 4; what modulation gives the two linear layers behind them, 2; q, k and v, 3; q and k
# normed, 2, and turned, 2; attention's output and the last layer's, 2; the hidden layer before and after GELU, 8; the
# MLP's output, 1.
SAVED = 4 + 2 + 3 + 2 + 2 + 2 + 8 + 1
KEPT = 1
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
    trunk = settings.freeze * block + patches / 2
    tail = whole - trunk if settings.freeze else whole
    reference = tail if settings.algo == "dpo" else 0
    return (
        CLIPS[settings.algo]
        * settings.batch
        * (whole + (1 if settings.lora_rank else 2) * tail + reference)
    )


def memory(model, settings, processes):
    """{part: bytes} in one process."""
    config = model.config
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in model.blocks[-1].parameters())
    blocks = sum(any(p.requires_grad for p in block.parameters()) for block in model.blocks)
    share = processes if settings.fsdp else 1
    parts = {
        "weights": 4 * every / share + 4 * every * (settings.algo == "dpo"),
        "gradients": 4 * trained / share,
        "optimiser": (12 if settings.ema else 8) * trained / share,
        "gathered": 8 * (every - (config.depth - 2) * block) if settings.fsdp else 0,
    }
    clips = CLIPS[settings.algo] * settings.batch / processes / settings.accum
    floats = clips * tokens(config) * config.dim
    parts["activations"] = 4 * floats * SAVED * blocks
    parts["activations, checkpointed"] = 4 * floats * (KEPT * blocks + SAVED)
    return parts


def plan(settings):
    """Lines: what `settings` will take on settings.plan processes, each of settings.flops FLOP/s. BadInput for what is not planned.

    Sizes are those of --preset or of the model --init, whatever --data says."""
    if settings.algo not in CLIPS:
        raise BadInput(
            f"--plan: knows the video model's trainings, {', '.join(CLIPS)}, not --algo {settings.algo}"
        )
    model = planned_model(settings)
    config, parts = model.config, memory(model, settings, settings.plan)
    every, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad >= least)
        for least in (False, True)
    )
    flops = step_flops(config, settings)
    lines = [f"{settings.algo}: {every / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, "]
    lines[0] += f"{config.depth} blocks, {tokens(config)} tokens a clip"
    way = "FSDP" if settings.fsdp else "DDP" if settings.plan > 1 else "alone"
    lines.append(f"a step: {CLIPS[settings.algo] * settings.batch} clips, {flops:.3g} FLOPs")
    lines.append(f"memory of each of {settings.plan} ({way}; GiB):")
    lines += [f"  {name:32}{size / 2**30:8.2f}" for name, size in parts.items()]
    fixed = sum(size for name, size in parts.items() if "activations" not in name)
    for name in ("activations", "activations, checkpointed"):
        lines.append(f"  total, {name:25}{(fixed + parts[name]) / 2**30:8.2f}")
    seconds = 1000 * flops / settings.plan / settings.flops
    lines.append(
        f"1,000 steps at {settings.flops:.3g} FLOP/s each: {seconds / 3600:.2f} hours; checkpointing adds a third"
    )
    return lines
