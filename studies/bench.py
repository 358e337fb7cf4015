"""Performance as ratios beside the best possible: what costs how much (docs/scaling.md).

The variants of a ratio take turns in one process and the median counts, so that a busy machine
slows all alike. On a CPU the clock is the process's own time on one thread; on a GPU it is the
wall's, once the device is idle. Times depend on the machine; ratios should carry over.
"""

import json
import math
import random
import statistics
import time
from functools import partial

import torch

from attention import attention
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step
from kernels.tiles import SlidingTiles, boolean_mask
from lora import freeze_trunk
from model import ModelConfig, VideoTransformer, load_velocity, share_trunk
from nrg import SteeredPolicy, guide, noisy_reward_on
from runtime.checkpoint import WEIGHTS
from runtime.cli import check_writable
from sample import CFG, NRG_EPS, sample
from studies.jobs import facts
from studies.report.tables import Table

RESULTS = {"bench": "one CPU core", "bench_h200": "H200"}  # files in results/
MEDIUM = ModelConfig(frames=4, size=32, channels=16, patch=(1, 4, 4), dim=256, depth=6, heads=4)
TILES = {"tile:2,8,8/1,1,1": (8, 16, 16), "tile:2,8,8/3,2,1": (16, 16, 16)}  # and their grids


def clock(device):
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def medians(ways, device, rounds=9):
    """{name: median seconds} of {name: function}, in another order every round: what ran before
    decides where tensors lie in memory. Medians are of shares of a round's time, so that a slow
    round leaves ratios alone. The first round does not count."""
    shares, totals = {name: [] for name in ways}, []
    for i in range(rounds + 1):
        taken = {}
        for name in random.Random(i).sample(list(ways), len(ways)):
            start = clock(device)
            ways[name]()
            taken[name] = clock(device) - start
        if i > 0:
            totals.append(sum(taken.values()))
            for name in ways:
                shares[name].append(taken[name] / totals[-1])
    middle = statistics.median(totals)
    return {name: statistics.median(shares[name]) * middle for name in ways}


def awake(config, device):
    """A model whose blocks are not the identity, as after some training."""
    torch.manual_seed(0)
    model = VideoTransformer(config).to(device)
    for value in model.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.02)
    return model


# ---------------------------------------------------------------------------------------------
# The parts: each yields (name, ratio, the best possible)


def training(device, pairs=4):
    """A step of a model of width 256 on 256 video tokens, in bfloat16 on a GPU."""
    full, frozen, reference = (awake(MEDIUM, device) for _ in range(3))
    freeze_trunk(frozen, 2)
    reference.requires_grad_(False)
    shared = share_trunk(frozen, reference, 2)
    x0_w, x0_l, x1 = torch.randn(3, pairs, *MEDIUM.video_shape, device=device)
    y = torch.ones(pairs, MEDIUM.max_text, dtype=torch.int64, device=device)
    t = torch.rand(pairs, device=device)
    x0, weight = torch.cat((x0_w, x0_l)), torch.ones(2 * pairs, device=device)
    y_both, t_both, x1_both = y.repeat(2, 1), t.repeat(2), x1.repeat(2, 1, 1, 1, 1)

    def sft():
        return flow_rwr_step(full, x0, y_both, weight, t_both, x1_both)

    def dpo(policy, shared_forward=None):
        batch = x0_w, x0_l, y, t, x1
        return flow_dpo_step(policy, reference, *batch, beta=100, shared_forward=shared_forward)

    def stepper(model, loss, checkpointed=False):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

        def step():
            model.grad_checkpoint = checkpointed
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value, _ = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    ways = {
        "SFT": stepper(full, sft),
        "checkpointed": stepper(full, sft, checkpointed=True),
        "DPO": stepper(full, partial(dpo, full)),
        "shared": stepper(frozen, partial(dpo, frozen, shared)),
    }
    seconds = medians(ways, device)
    yield "SFT: gradient checkpointing / none", seconds["checkpointed"] / seconds["SFT"], 4 / 3
    yield "Flow-DPO / SFT on both clips", seconds["DPO"] / seconds["SFT"], 4 / 3
    yield "Flow-DPO, 2 of 6 blocks shared / SFT", seconds["shared"] / seconds["SFT"], 1.0


def tiles(device):
    """Sliding tiles: what is saved of dense attention's time, as a share of what is left out."""
    batch, heads, dtype = (8, 16, torch.bfloat16) if device.type == "cuda" else (1, 4, None)
    for shape, grid in TILES.items():
        count = math.prod(grid)
        mask = SlidingTiles(shape, grid, 0).to(device)
        density = boolean_mask(mask, count).float().mean().item()
        x = torch.randn(3, batch, heads, count, 64, device=device, dtype=dtype, requires_grad=True)

        def way(tiles=None, x=x):
            out = attention(*x, tiles=tiles)
            torch.autograd.grad(out, x, out.detach())

        seconds = medians({"dense": way, "tiles": partial(way, mask)}, device)
        name = f"{shape}, density {density:.2f}: speed-up x density"
        yield name, seconds["dense"] / seconds["tiles"] * density, 1.0


def sampling(device):
    """A step with CFG and with guidance against a plain one, on 16 clips."""
    model, _ = load_velocity(WEIGHTS / "base.pt")
    model = model.to(device).requires_grad_(False)
    read, depth = 2, model.config.depth
    reward = noisy_reward_on(model, read).to(device)
    guidance = guide(reward, (1, 1, 1), 1.0, NRG_EPS)
    x1 = torch.randn(16, *model.config.video_shape, device=device)
    y = torch.ones(16, model.config.max_text, dtype=torch.int64, device=device)
    ways = {
        "plain": partial(sample, model, x1, y, 4),
        "CFG": partial(sample, model, x1, y, 4, cfg=CFG),
        "shared": partial(sample, SteeredPolicy(model, reward, (1, 1, 1), 1.0, NRG_EPS), x1, y, 4),
        "own": partial(sample, model, x1, y, 4, guidance=guidance),
    }
    seconds = medians(ways, device)
    yield "CFG / plain sampling", seconds["CFG"] / seconds["plain"], 2.0
    yield (
        "NRG, shared trunk / plain sampling",
        seconds["shared"] / seconds["plain"],
        1 + read / depth,
    )
    yield "NRG, own trunk / plain sampling", seconds["own"] / seconds["plain"], 1 + 2 * read / depth


def run(settings):
    """Prints every ratio beside the best possible, and writes bench.json to --out."""
    check_writable(settings.out, "--out")
    torch.set_num_threads(1)
    rows = []
    for part in (training, tiles, sampling):
        for name, value, best in part(settings.device):
            print(f"{name:60} {value:6.3f}   ({best:.2f})", flush=True)
            rows.append({"name": name, "value": value, "best": best})
    saved = {**facts(settings.device), "rows": rows}
    (settings.out / "bench.json").write_text(json.dumps(saved, indent=1) + "\n")


def table(results):
    """The ratios of {file of RESULTS: rows} beside the best possible."""
    cells = {}
    for file, rows in results.items():
        for row in rows:
            values = cells.setdefault(row["name"], {"best": f"{row['best']:.3g}"})
            values[file] = f"{row['value']:.2f}"
    columns = [*results, "best"]
    lines = [[name, *(values.get(key, "–") for key in columns)] for name, values in cells.items()]
    return Table("", ["ratio", *(RESULTS[file] for file in results), "at best"], lines)
