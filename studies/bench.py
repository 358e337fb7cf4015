"""What training steps cost in units of a step of SFT, beside the best possible (docs/scaling.md).

The functions take turns in one process and the median counts, so that a busy machine slows all
alike. On a CPU the clock is the process's own time on one thread; on a GPU it is the wall's, once
the device is idle. Times depend on the machine; ratios should carry over.
"""

import json
import random
import statistics
import time
from functools import partial

import torch

from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step
from lora import freeze_trunk
from model import ModelConfig, VideoTransformer, share_trunk
from runtime.cli import check_writable
from studies.jobs import facts
from studies.report.tables import Table

RESULTS = {"bench": "one CPU core", "bench_h200": "H200"}  # files in results/
MEDIUM = ModelConfig(frames=4, size=32, channels=16, patch=(1, 4, 4), dim=256, depth=6, heads=4)


def clock(device):
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def times(ways, device, rounds=9):
    """{name: median time in units of the first one's} of {name: function}. Every round takes them
    in another order, since what ran before decides where tensors lie in memory; the first round
    does not count."""
    first, found = next(iter(ways)), {name: [] for name in ways}
    for i in range(rounds + 1):
        taken = {}
        for name in random.Random(i).sample(list(ways), len(ways)):
            start = clock(device)
            ways[name]()
            taken[name] = clock(device) - start
        if i > 0:
            for name in ways:
                found[name].append(taken[name] / taken[first])
    return {name: statistics.median(values) for name, values in found.items()}


def awake(config, device):
    """A model whose blocks are not the identity, as after some training."""
    torch.manual_seed(0)
    model = VideoTransformer(config).to(device)
    for value in model.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.02)
    return model


def training(device):
    """{name: (training step, lowest possible time in units of the first one's)}: a step on four
    pairs, of a model of width 256 on 256 video tokens; bfloat16 on a GPU."""
    full, frozen, reference = (awake(MEDIUM, device) for _ in range(3))
    freeze_trunk(frozen, 2)
    reference.requires_grad_(False)
    shared = share_trunk(frozen, reference, 2)
    x0, x1 = torch.randn(2, 8, *MEDIUM.video_shape, device=device)
    y = torch.ones(8, MEDIUM.max_text, dtype=torch.int64, device=device)
    t = torch.rand(8, device=device)

    def sft():
        return flow_rwr_step(full, x0, y, torch.ones_like(t), t, x1)

    def dpo(policy, shared_forward=None):
        batch = x0[:4], x0[4:], y[:4], t[:4], x1[:4]
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

    return {
        "SFT step on both clips": (stepper(full, sft), 1),
        "SFT step, gradient checkpointing": (stepper(full, sft, checkpointed=True), 4 / 3),
        "Flow-DPO step": (stepper(full, partial(dpo, full)), 4 / 3),
        "Flow-DPO step, 2 of 6 blocks shared": (stepper(frozen, partial(dpo, frozen, shared)), 1),
    }


def run(settings):
    """Prints every ratio beside the best possible, and writes bench.json to --out."""
    check_writable(settings.out, "--out")
    torch.set_num_threads(1)
    steps = training(settings.device)
    found = times({name: step for name, (step, _) in steps.items()}, settings.device)
    first, *others = steps
    rows = []
    for name in others:
        row = {"name": f"{name} / {first}", "value": found[name], "best": steps[name][1]}
        rows.append(row)
        print("{name:60} {value:6.3f}   ({best:.2f})".format(**row))
    saved = {**facts(settings.device), "rows": rows}
    (settings.out / "bench.json").write_text(json.dumps(saved, indent=1) + "\n")


def table(results):
    """The ratios of {file of RESULTS: rows} beside the best possible."""
    cells = {}
    for file, rows in results.items():
        for row in rows:
            values = cells.setdefault(row["name"], {"best": f"{row['best']:.2f}"})
            values[file] = f"{row['value']:.2f}"
    columns = [*results, "best"]
    lines = [[name, *(values.get(key, "–") for key in columns)] for name, values in cells.items()]
    return Table("", ["time of", *(RESULTS[file] for file in results), "at best"], lines)
