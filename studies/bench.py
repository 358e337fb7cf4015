"""Every performance ratio in one run, beside its floor: what costs how much, and against what.

    python evaluate.py bench                   all of it; writes results/bench.json
    python evaluate.py bench --only dense      one part

Variants of one ratio take turns in one process and the median counts, so that a busy machine slows all alike. On a CPU
the clock is the process's own time on one thread; on a GPU it is the wall's, once the device is idle. The rate of
matrix products, against which a training step is held, is measured in the same run. Times are of this machine, ratios
should carry over.
"""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention import attention, choose
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step
from kernels.tiles import SlidingTiles, boolean_mask
from lora import freeze_trunk
from model import PRESETS, ModelConfig, VideoTransformer, load_velocity, share_trunk
from nrg import SteeredPolicy, guide, noisy_reward_on
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput, has_bf16
from sample import CFG, NRG_EPS, sample
from settings import settings_of
from studies.cost import step_flops
from studies.jobs import facts, medians, save_json
from tasks import TASKS

# Between the presets: 256 video tokens, width 256
MEDIUM = ModelConfig(frames=4, size=32, channels=16, patch=(1, 4, 4), dim=256, depth=4, heads=4)


def product(device, dtype):
    """(function, FLOPs) of a matrix product: on a CPU of the shape of a model's, on a GPU one that fills it."""
    tokens, size = (8192, 8192) if device.type == "cuda" else (4096, 1024)
    a, b = (torch.randn(n, size, device=device, dtype=dtype) for n in (tokens, size))
    return lambda: a @ b, 2 * tokens * size * size


# ---------------------------------------------------------------------------------------------
# Training


def awake(config, device):
    """A model whose blocks are not the identity, as after some training."""
    torch.manual_seed(0)
    model = VideoTransformer(config).to(device)
    for value in model.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.02)
    return model


def clips(config, count, device):
    """(x0, x0', y): two sets of clips and their prompts."""
    y = torch.ones(count, config.max_text, dtype=torch.int64, device=device)
    return *torch.randn(2, count, *config.video_shape).to(device), y


def stepper(model, loss):
    """A whole step of loss() -> (loss, logs): forward, backward, AdamW."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)

    def step():
        loss()[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare(config, batch, device, dtype):
    """The linear layers and the attention of a step's blocks, forward and backward, and nothing between them."""
    n, d = batch * (config.max_text + math.prod(config.grid)), config.dim
    shapes = (d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)
    layers = [(torch.randn(n, a), torch.randn(n, b), torch.randn(b, a)) for a, b in shapes]
    layers = [tuple(x.to(device, dtype) for x in layer) for layer in layers]
    q, k, v = torch.randn(
        3, batch, config.heads, n // batch, d // config.heads, device=device, dtype=dtype
    )
    attend = forward_backward(q, k, v)

    def blocks():
        for _ in range(config.depth):
            attend()
            for x, grad, weight in layers:
                x @ weight.T, grad @ weight, grad.T @ x

    return blocks


def training(device):
    """The step against matrix products, what its layers alone would take of it, and what checkpointing costs."""
    rows = []
    kinds = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if has_bf16(device) else {})
    sizes = [("nano", PRESETS["nano"], 32), ("d256, 256 tokens", MEDIUM, 8)]
    if device.type == "cuda":
        kinds.pop("float32")
        sizes += [("small", PRESETS["small"], 64), ("base", PRESETS["base"], 16)]
    for name, config, batch in sizes:
        for kind, dtype in kinds.items():
            model, (x0, x1, y) = awake(config, device), clips(config, batch, device)
            weight, t = torch.ones(batch, device=device), torch.rand(batch, device=device)

            def loss(model=model, inputs=(x0, y, weight, t, x1), dtype=dtype):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    return flow_rwr_step(model, *inputs)

            step = stepper(model, loss)

            def checkpointed(model=model, step=step):
                model.grad_checkpoint = True
                step()
                model.grad_checkpoint = False

            multiply, flops = product(device, dtype)
            alone = bare(config, batch, device, dtype)
            ways = {"product": multiply, "step": step, "checkpointed": checkpointed, "bare": alone}
            if device.type == "cuda":
                compiled = awake(config, device)
                for block in compiled.blocks:
                    block.compile()
                ways["compiled"] = stepper(compiled, partial(loss, compiled))
            took = medians(ways, device)
            rate = flops / took["product"]
            needed = step_flops(config, settings_of(["--algo=pretrain", f"--batch={batch}"]))
            share = needed / took["step"] / rate
            rows.append(
                (
                    f"{name}, {kind}: share of the matrix rate ({rate / 1e9:,.0f} GFLOP/s)",
                    share,
                    1.0,
                )
            )
            if "compiled" in took:
                share = needed / took["compiled"] / rate
                rows.append(
                    (f"{name}, {kind}, compiled blocks: share of the matrix rate", share, 1.0)
                )
                label = f"{name}, {kind}, compiled blocks: {batch / took['compiled']:,.0f} clips/s; compiled / not"
                rows.append((label, took["compiled"] / took["step"], 0.0))
            rows.append(
                (
                    f"{name}, {kind}: linear layers and attention alone / step",
                    took["bare"] / took["step"],
                    1.0,
                )
            )
            rows.append(
                (f"{name}, {kind}: checkpointed / not", took["checkpointed"] / took["step"], 4 / 3)
            )
    return rows


def alignment(device):
    """A step of each algorithm against SFT on both clips of as many pairs."""
    config, count = replace(MEDIUM, depth=6), 4
    x0_w, x0_l, y = clips(config, count, device)
    both, prompts, ones = (
        torch.cat((x0_w, x0_l)),
        torch.cat((y, y)),
        torch.ones(2 * count, device=device),
    )
    full, frozen, reference = awake(config, device), awake(config, device), awake(config, device)
    freeze_trunk(frozen, 2)
    reference.requires_grad_(False)
    shared = share_trunk(frozen, reference, 2)
    weight, t = torch.rand(2 * count, device=device) + 0.5, torch.rand(2 * count, device=device)
    x1 = torch.randn_like(both)

    def dpo(policy, shared_forward=None):
        batch = x0_w, x0_l, y, t[:count], x1[:count]
        return stepper(
            policy,
            lambda: flow_dpo_step(policy, reference, *batch, 100.0, shared_forward=shared_forward),
        )

    def regression(weight):
        return stepper(full, lambda: flow_rwr_step(full, both, prompts, weight, t, x1))

    ways = {
        "SFT": regression(ones),
        "RWR": regression(weight),
        "DPO": dpo(full),
        "shared": dpo(frozen, shared),
    }
    took = medians(ways, device)
    names = {
        "RWR": ("RWR", 1.0),
        "DPO": ("DPO, reference online", 4 / 3),
        "shared": ("DPO, 2 of 6 blocks shared", 1.0),
    }
    return [
        (f"{name} / SFT on both clips", took[way] / took["SFT"], floor)
        for way, (name, floor) in names.items()
    ]


def outside(device):
    """What a step spends outside forward, backward and optimiser, for each algorithm's default batch."""
    rows = []
    for algo in ("pretrain", "reward", "nrg", "rwr", "dpo"):
        few = [] if algo == "pretrain" else ["--pairs=256"]
        if algo in ("reward", "nrg"):
            few.append("--eval-pairs=8")
        args = settings_of([f"--algo={algo}", *few])
        task = TASKS[algo](args, device)
        trained = [value for value in task.model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)
        state = {}

        def data(task=task, state=state, args=args):
            rows = slice(0, args.batch)
            state["batch"] = {name: value.to(device) for name, value in task.batch(0, rows).items()}

        def learn(task=task, state=state):
            state["loss"], state["logs"] = task.loss(state["batch"])
            state["loss"].backward()

        def clip_and_log(trained=trained, state=state):
            state["logs"]["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            json.dumps(state["logs"])

        def update(optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        ways = {"data": data, "learn": learn, "log": clip_and_log, "update": update}
        took = medians(ways, device, ordered=True)
        rows.append(
            (
                f"{algo}: data, clipping, logs / step",
                (took["data"] + took["log"]) / sum(took.values()),
                0.0,
            )
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Attention


def forward_backward(q, k, v, **settings):
    def both():
        x = [tensor.requires_grad_(True) for tensor in (q, k, v)]
        out = attention(*x, **settings)
        torch.autograd.grad(out, x, out.detach())

    return both


def dense(device):
    """`auto` against the best backend."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        slow = set()
        for count in (64, 128, 256, 512, 1024, 2048, 4096):
            clips_n = max(
                1, (65536 if device.type == "cuda" else 2048) // count
            )  # a GPU wants more to do
            q, k, v = torch.randn(3, clips_n, count, 4, 64, device=device, dtype=dtype).transpose(
                2, 3
            )
            backends = {"naive", "sdpa", *(["sdpa32"] if dtype == torch.bfloat16 else [])} - slow
            if device.type == "cuda":
                backends |= {"triton"}
            mine = choose(q)
            ways = sorted(backends | {mine})
            took = medians(
                {name: forward_backward(q, k, v, backend=name) for name in ways}, device, 9
            )
            best = min(took, key=took.get)
            slow |= {
                name for name in took if took[name] > 3 * took[best]
            }  # not tried on longer ones
            name = f"{str(dtype)[6:]}, {count} tokens: auto ({mine}) / best ({best})"
            rows.append((name, took[mine] / took[best], 1.0))
    return rows


def tiles(device):
    """Sliding tiles: dense time / their time, as a share of what the density promises."""
    rows = []
    plans = [
        ("tile:2,8,8/1,1,1", (8, 16, 16)),
        ("tile:2,8,8/3,1,1", (16, 16, 16)),
        ("tile:4,8,8/1,1,1", (16, 16, 16)),
    ]
    plans += [("tile:4,4,4/1,2,3", (16, 16, 16)), ("tile:2,8,8/3,2,1", (16, 16, 16))]
    for text, grid in plans:
        mask, count = SlidingTiles(text, grid, 0).to(device), math.prod(grid)
        density = boolean_mask(mask, count).float().mean().item()
        q, k, v = torch.randn(3, 1, 4, count, 64, device=device)
        if device.type == "cuda":
            q, k, v = torch.randn(3, 8, 16, count, 64, device=device, dtype=torch.bfloat16)
        ways = {"dense": forward_backward(q, k, v), "tile": forward_backward(q, k, v, tiles=mask)}
        took = medians(ways, device, 9)
        name = (
            f"{text}, {count} tokens, density {density:.2f}, {choose(q, mask)}: speed-up x density"
        )
        rows.append((name, took["dense"] / took["tile"] * density, 1.0))
    return rows


def kernels(device):
    """Triton's dense kernels against the best that torch has, forward and backward (on a GPU alone)."""
    rows = []
    if device.type != "cuda":
        return rows
    torch_has = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    for dim, count in itertools.product((64, 128), (4096, 8192, 16384)):
        heads = 2048 // dim
        q, k, v = torch.randn(
            3, 32768 // count, heads, count, dim, device=device, dtype=torch.bfloat16
        )
        flops = 4 * 32768 * count * heads * dim  # forward; backward has 5 products for its 2

        def forward(backend=None, q=q, k=k, v=v):
            if backend is None:
                return attention(q, k, v, backend="triton")
            with sdpa_kernel(backend):
                return attention(q, k, v, backend="sdpa")

        def backward(backend=None, q=q, k=k, v=v):
            x = [tensor.detach().requires_grad_(True) for tensor in (q, k, v)]
            out = forward(backend, *x)
            torch.autograd.grad(out, x, out.detach())

        ways = {"Triton": None} | torch_has
        for name, run, times in (("forward", forward, 1), ("forward and backward", backward, 3.5)):
            took = medians({way: partial(run, backend) for way, backend in ways.items()}, device, 9)
            rates = ", ".join(
                f"{way} {times * flops / seconds / 1e12:.0f}" for way, seconds in took.items()
            )
            best = min(took[way] for way in torch_has)
            label = f"D {dim}, {count} tokens, {name} ({rates} TFLOP/s): Triton / best"
            rows.append((label, best / took["Triton"], 1.0))
    return rows


# ---------------------------------------------------------------------------------------------
# Sampling and memory


def sampling_seconds(device, rounds=9):
    """{way: median seconds of 4 sampling steps of 16 clips}, the four ways taken in turn."""
    model, _ = load_velocity(WEIGHTS / "base.pt")
    model = model.to(device).requires_grad_(False)
    reward = noisy_reward_on(model, settings_of(["--algo=nrg"]).read).to(device)
    shared = SteeredPolicy(model, reward, (1, 1, 1), 1.0, NRG_EPS)
    own = guide(reward, (1, 1, 1), 1.0, NRG_EPS)
    x1 = torch.randn(16, *model.config.video_shape).to(device)
    y = torch.ones(16, model.config.max_text, dtype=torch.int64, device=device)
    ways = {"plain": (model, 1.0, None), "CFG": (model, CFG, None)}
    ways |= {"NRG, shared trunk": (shared, 1.0, None), "NRG, own trunk": (model, 1.0, own)}
    runs = {
        way: partial(sample, velocity, x1, y, steps=4, cfg=cfg, guidance=steering)
        for way, (velocity, cfg, steering) in ways.items()
    }
    return medians(runs, device, rounds)


def sampling(device):
    """Guidance against a plain step and a step with CFG."""
    took = sampling_seconds(device)
    read, depth = 2, PRESETS["nano"].depth
    return [
        ("CFG / plain", took["CFG"] / took["plain"], 2.0),
        ("NRG, shared trunk / plain", took["NRG, shared trunk"] / took["plain"], 1 + read / depth),
        (
            "NRG, shared trunk / CFG",
            took["NRG, shared trunk"] / took["CFG"],
            (1 + read / depth) / 2,
        ),
        ("NRG, own trunk / plain", took["NRG, own trunk"] / took["plain"], 1 + 2 * read / depth),
    ]


def saved_numbers(config, checkpointed, batch=2):
    """Numbers that one more block keeps for backward, for each channel of each token."""
    kept = []
    for depth in (2, 4):
        model, (x0, _, y) = (
            awake(replace(config, depth=depth), torch.device("cpu")),
            clips(config, batch, "cpu"),
        )
        model.grad_checkpoint = checkpointed
        weights = {
            value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())
        }
        storages = {}

        def pack(x, weights=weights, storages=storages):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (
                    storage.nbytes(),
                    x,
                )  # x is held, so that no other takes its place
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(x0, torch.rand(batch), y)
        kept.append(sum(size for size, _ in storages.values()))
    tokens = batch * (config.max_text + math.prod(config.grid))
    return (kept[1] - kept[0]) / 2 / 4 / tokens / config.dim


def memory(device):
    """What a block keeps for backward, counted on the CPU."""
    names = {False: "numbers a channel, token and block", True: "the same, checkpointed"}
    return [
        (name, saved_numbers(MEDIUM, checkpointed), float(checkpointed))
        for checkpointed, name in names.items()
    ]


PARTS = {
    "training": training,
    "alignment": alignment,
    "outside": outside,
    "dense": dense,
    "tiles": tiles,
    "kernels": kernels,
    "sampling": sampling,
    "memory": memory,
}


def run(args, device):
    """Prints every ratio beside its floor; writes args.out/bench.json unless --only names some of PARTS."""
    for part in args.only or []:
        if part not in PARTS:
            raise BadInput(f"--only {part}: no part of the bench; known: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    rows = []
    for part in args.only or PARTS:
        print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}")
        for name, value, floor in PARTS[part](device):
            print(f"  {name:68} {value:6.3f}   ({floor:.2f})", flush=True)
            rows.append({"part": part, "name": name, "value": value, "floor": floor})
    if not args.only:
        save_json(args.out / "bench.json", {**facts(device), "rows": rows})
