"""Performance as ratios, beside the best possible: what costs how much, and against what.

    python evaluate.py bench                   all of it; writes bench.json to --out
    python evaluate.py bench --only tiles      one part

The variants of a ratio take turns in one process and the median counts, so that a busy machine
slows all alike. On a CPU the clock is the process's own time on one thread; on a GPU it is the
wall's, once the device is idle. Times depend on the machine; ratios should carry over.
"""

import math
import random
import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from attention import attention, choose
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step
from kernels.tiles import SlidingTiles, boolean_mask
from lora import freeze_trunk
from model import PRESETS, ModelConfig, VideoTransformer, load_velocity, share_trunk
from nrg import SteeredPolicy, guide, noisy_reward_on
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput
from runtime.device import has_bf16
from sample import CFG, NRG_EPS, sample
from settings import settings_of
from studies.cost import step_flops
from studies.jobs import facts, save_json

# Between the presets: 256 video tokens, width 256
MEDIUM = ModelConfig(frames=4, size=32, channels=16, patch=(1, 4, 4), dim=256, depth=4, heads=4)


def clock(device):
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def medians(ways, device, rounds=21):
    """{name: median seconds} of {name: function}, in another order every round: what ran before
    decides where tensors lie in memory. Medians are of shares of a round's time, so that a slow
    round leaves ratios alone. The first round does not count."""
    seconds = []
    for i in range(rounds + 1):
        taken = {}
        for name in random.Random(i).sample(list(ways), len(ways)):
            start = clock(device)
            ways[name]()
            taken[name] = clock(device) - start
        seconds.append(taken)
    totals = [sum(taken.values()) for taken in seconds[1:]]
    middle = {}
    for name in ways:
        shares = [taken[name] / total for taken, total in zip(seconds[1:], totals)]
        middle[name] = statistics.median(shares) * statistics.median(totals)
    return middle


def awake(config, device):
    """A model whose blocks are not the identity, as after some training."""
    torch.manual_seed(0)
    model = VideoTransformer(config).to(device)
    for value in model.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.02)
    return model


def stepper(model, loss):
    """A whole step of loss() -> (loss, logs): forward, backward, AdamW."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)

    def step():
        loss()[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def regression(model, batch, device, dtype=torch.float32):
    """loss() -> (loss, logs) of flow matching on random clips."""
    x0, x1 = torch.randn(2, batch, *model.config.video_shape).to(device)
    y = torch.ones(batch, model.config.max_text, dtype=torch.int64, device=device)
    weight, t = torch.ones(batch, device=device), torch.rand(batch, device=device)

    def loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return flow_rwr_step(model, x0, y, weight, t, x1)

    return loss


# ---------------------------------------------------------------------------------------------
# The parts: each yields (name, ratio, the best possible)


def training(device):
    """A step against matrix products, and what gradient checkpointing costs."""
    kinds = [torch.float32, *([torch.bfloat16] if has_bf16(device) else [])]
    sizes = [("nano", PRESETS["nano"], 32), ("d256, 256 tokens", MEDIUM, 8)]
    tokens, width = 4096, 1024
    if device.type == "cuda":
        kinds, tokens, width = [torch.bfloat16], 8192, 8192
        sizes += [("small", PRESETS["small"], 64), ("base", PRESETS["base"], 16)]
    for (size, config, batch), dtype in product(sizes, kinds):
        a = torch.randn(tokens, width, device=device, dtype=dtype)
        b = torch.randn(width, width, device=device, dtype=dtype)
        model = awake(config, device)
        step = stepper(model, regression(model, batch, device, dtype))

        def checkpointed(model=model, step=step):
            model.grad_checkpoint = True
            step()
            model.grad_checkpoint = False

        ways = {"product": partial(torch.matmul, a, b), "step": step, "checkpointed": checkpointed}
        seconds = medians(ways, device)
        rate = 2 * tokens * width * width / seconds["product"]
        flops = step_flops(config, settings_of(["--algo=pretrain", f"--batch={batch}"]))
        name = f"{size}, {str(dtype).removeprefix('torch.')}"
        rates = f"share of the matrix rate ({rate / 1e9:,.0f} GFLOP/s)"
        yield f"{name}: {rates}", flops / seconds["step"] / rate, 1.0
        yield f"{name}: checkpointed / not", seconds["checkpointed"] / seconds["step"], 4 / 3


def alignment(device):
    """A step of each algorithm against SFT on both clips of as many pairs."""
    config, count = replace(MEDIUM, depth=6), 4
    full, frozen, reference = (awake(config, device) for _ in range(3))
    freeze_trunk(frozen, 2)
    reference.requires_grad_(False)
    shared = share_trunk(frozen, reference, 2)
    x0_w, x0_l, x1 = torch.randn(3, count, *config.video_shape).to(device)
    y = torch.ones(count, config.max_text, dtype=torch.int64, device=device)
    t = torch.rand(count, device=device)

    def dpo(policy, shared_forward=None):
        batch = x0_w, x0_l, y, t, x1
        settings = {"beta": 100.0, "shared_forward": shared_forward}
        return stepper(policy, lambda: flow_dpo_step(policy, reference, *batch, **settings))

    ways = {
        "SFT": stepper(full, regression(full, 2 * count, device)),
        "DPO, reference online": dpo(full),
        "DPO, 2 of 6 blocks shared": dpo(frozen, shared),
    }
    seconds = medians(ways, device)
    for name, best in (("DPO, reference online", 4 / 3), ("DPO, 2 of 6 blocks shared", 1.0)):
        yield f"{name} / SFT on both clips", seconds[name] / seconds["SFT"], best


def forward_backward(q, k, v, **settings):
    def both():
        x = [tensor.detach().requires_grad_(True) for tensor in (q, k, v)]
        out = attention(*x, **settings)
        torch.autograd.grad(out, x, out.detach())

    return both


def tiles(device):
    """Sliding tiles: dense time / their time, as a share of what the density promises."""
    batch, heads, dtype = 1, 4, torch.float32
    if device.type == "cuda":
        batch, heads, dtype = 8, 16, torch.bfloat16
    shapes = ["tile:2,8,8/3,1,1", "tile:4,8,8/1,1,1", "tile:4,4,4/1,2,3", "tile:2,8,8/3,2,1"]
    for shape, grid in [("tile:2,8,8/1,1,1", (8, 16, 16)), *((s, (16, 16, 16)) for s in shapes)]:
        count = math.prod(grid)
        mask = SlidingTiles(shape, grid, 0).to(device)
        density = boolean_mask(mask, count).float().mean().item()
        q, k, v = torch.randn(3, batch, heads, count, 64, device=device, dtype=dtype)
        ways = {"dense": forward_backward(q, k, v), "tile": forward_backward(q, k, v, tiles=mask)}
        seconds = medians(ways, device, 9)
        name = f"{shape}, {count} tokens, density {density:.2f}, {choose(q, mask)}"
        yield f"{name}: speed-up x density", seconds["dense"] / seconds["tile"] * density, 1.0


def sampling(device, rounds=9):
    """Guidance against a plain step and a step with CFG: 4 sampling steps of 16 clips."""
    model, _ = load_velocity(WEIGHTS / "base.pt")
    model = model.to(device).requires_grad_(False)
    read, depth = 2, model.config.depth
    reward = noisy_reward_on(model, read).to(device)
    shared = SteeredPolicy(model, reward, (1, 1, 1), 1.0, NRG_EPS)
    x1 = torch.randn(16, *model.config.video_shape).to(device)
    y = torch.ones(16, model.config.max_text, dtype=torch.int64, device=device)

    def way(velocity, cfg=1.0, guidance=None):
        return partial(sample, velocity, x1, y, steps=4, cfg=cfg, guidance=guidance)

    ways = {"plain": way(model), "CFG": way(model, CFG)}
    ways["NRG, shared trunk"] = way(shared)
    ways["NRG, own trunk"] = way(model, guidance=guide(reward, (1, 1, 1), 1.0, NRG_EPS))
    seconds = medians(ways, device, rounds)
    bests = {
        "CFG": 2.0,
        "NRG, shared trunk": 1 + read / depth,
        "NRG, own trunk": 1 + 2 * read / depth,
    }
    for name, best in bests.items():
        yield f"{name} / plain", seconds[name] / seconds["plain"], best


PARTS = {part.__name__: part for part in (training, alignment, tiles, sampling)}


def run(settings):
    """Prints every ratio beside the best possible; writes bench.json unless --only names some
    parts."""
    if settings.only and settings.only not in PARTS:
        known = ", ".join(PARTS)
        raise BadInput(f"--only {settings.only}: no part of the bench; known: {known}")
    torch.set_num_threads(1)
    rows = []
    for part in [settings.only] if settings.only else PARTS:
        print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}")
        for name, value, best in PARTS[part](settings.device):
            print(f"  {name:68} {value:6.3f}   ({best:.2f})", flush=True)
            rows.append({"part": part, "name": name, "value": value, "floor": best})
    if not settings.only:
        settings.out.mkdir(parents=True, exist_ok=True)
        save_json(settings.out / "bench.json", {**facts(settings.device), "rows": rows})
