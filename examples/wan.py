"""Flow-DPO, Flow-RWR and SFT on an open video model: diffusers' Wan (sections 4.2 and 4.3).

    pip install diffusers accelerate peft           for this folder alone; tested with 0.42.1
    python examples/wan.py --tiny dpo --steps 20    a random model of 0.04 M parameters: seconds
    python examples/wan.py --model WAN --data PAIRS dpo --steps 2000
    torchrun --nproc_per_node 8 examples/wan.py --model WAN --data PAIRS dpo --batch 64 --accum 8

Losses and training loop are the toy's own. What differs is in wan_model.py and latents.py: Wan
takes latents of its VAE and embeddings of its text encoder, both computed beforehand (README.md);
its clock runs to 1000; only adapters are trained.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's modules, from any folder

from data import draw_noise, epoch_index, step_rng, take
from examples import latents
from flags import flag, option, parse, positive, positive_int
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from ranking import label_rewards, winners
from runtime import cli, distributed, resume
from runtime.cli import BadInput
from settings import Training
from trainer import Task, fit

try:
    import accelerate  # noqa: F401, diffusers loads weights by it

    from examples import wan_model
except (ImportError, RuntimeError) as error:  # RuntimeError: a package of diffusers does not load
    need = "diffusers is needed: pip install diffusers accelerate peft"
    print(f"wan.py: error: {need} ({str(error).partition(chr(10))[0]})", file=sys.stderr)
    sys.exit(2)

ALGORITHMS = ("dpo", "rwr", "sft")
UNREAD = ("compile", "ema", "export", "fsdp", "grad_checkpoint")  # flags of Training


@dataclass
class Wan(Training):
    """dpo, rwr or sft on Wan: one of these words, and flags"""

    algo: str = ""
    batch: int = 1
    lr: float = 5e-6
    save_every: int = 100
    out: Path = Path("out/wan")
    tiny: bool = flag(False, "a random model, made-up pairs, and defaults for them")
    model: Path = flag(None, "folder of Wan in diffusers' format, or of its transformer", Path)
    data: Path = flag(None, "CSV of pairs (examples/latents.py)", Path, file=True)
    lora: Path = flag(None, "adapters to start from", Path, file=True)
    rank: int = flag(64, "of new adapters", positive_int, without=("lora",))
    beta: float = flag(500.0, "dpo: larger stays closer to the reference", positive)
    shift: float = flag(3.0, "of t towards noise; 5 at 720 lines", positive)


def settings_of(words):
    """The settings of a command line, in which the algorithm stands without its flag."""
    words = [f"--algo={word}" if word in ALGORITHMS else word for word in words]
    if "--tiny" in words:
        words = ["--precision=float32", "--lr=1e-3", "--batch=8", "--beta=10", *words]
    settings, unknown = parse(Wan, words)
    unknown += [option(name) for name in UNREAD if getattr(settings, name)]
    if settings.algo not in ALGORITHMS:
        raise BadInput(f"give one of {', '.join(ALGORITHMS)}; --help lists the flags")
    if unknown:
        raise BadInput(f"{unknown[0]}: not read by wan.py; --help lists the flags")
    if settings.tiny:
        settings.model, settings.data = settings.out / "tiny", settings.out / "tiny/pairs.csv"
    if not settings.model or not settings.data:
        raise BadInput("--model and --data are needed; --tiny tries the commands without")
    settings.out /= settings.algo
    return settings


def alignment_task(wan, pairs, settings, device):
    """SFT, Flow-RWR or Flow-DPO of Wan's adapters, from people's labels."""
    policy = wan_model.Velocity(wan.to(device))
    is_rwr = settings.algo == "rwr"
    reward = label_rewards(pairs.label, pairs.mos, (1.0, 1.0, 1.0), ratings=is_rwr)  # (N, 2)
    if is_rwr:
        pair, side = reward.isfinite().nonzero().T  # every clip with a label or rating
        weight = rwr_weights(reward[pair, side])
    else:
        pair, side = winners(reward)
        weight = torch.ones(len(pair))

    def reference(x_t, t, y):
        with wan_model.as_reference(wan):
            return policy(x_t, t, y)

    def batch(step, rows):
        index = epoch_index(len(pair), settings.batch, step, settings.seed)[rows]
        rng = step_rng(settings.seed, step)
        noise = take(draw_noise(settings.batch, pairs.shape, settings.shift, rng), rows)
        y, x0 = pairs.texts(pair[index]), pairs.clips(pair[index], side[index])
        if settings.algo == "dpo":
            x0_l = pairs.clips(pair[index], 1 - side[index])
            return {"x0_w": x0, "x0_l": x0_l, "y": y, **noise}
        return {"x0": x0, "y": y, "weight": weight[index], **noise}

    def loss(batch):
        if settings.algo == "dpo":
            return flow_dpo_step(policy, reference, **batch, beta=settings.beta)
        return flow_rwr_step(policy, **batch)

    def evaluate(_, out):
        path = out.with_suffix(".safetensors")
        wan_model.write_adapters(wan, path)
        return [f"wrote {path}"]

    return Task(f"wan {settings.algo}", policy, [], batch, loss, ("loss", "accuracy"), evaluate)


@torch.no_grad()
def check_start(task, device):
    """Prints the loss of the first pair. It is ln 2 if the policy starts at its reference."""
    first = {name: value.to(device) for name, value in task.batch(0, slice(0, 1)).items()}
    loss, logs = task.loss(first)
    print(f"dpo: first loss {loss:.4f}, accuracy {logs['accuracy']:.2f}")
    if abs(loss - math.log(2)) > 1e-3:
        print("dpo: that is not ln 2 = 0.6931: the policy does not start at its reference")


def main():
    """Writes OUT/ALGO/last.pt, which --resume reads, and adapters to OUT/ALGO.safetensors."""
    settings = settings_of(sys.argv[1:])
    device = distributed.start_process(settings.device)
    is_main = distributed.rank() == 0
    distributed.check_flags(settings)
    with distributed.process_0_first():
        if settings.tiny and is_main:
            wan_model.write_tiny(settings.model)
            latents.write_tiny(settings.data.parent)
        if not resume.resumes(settings):  # a new run takes the place of an old one
            (settings.out / "last.pt").unlink(missing_ok=True)
        state = resume.opened_run(settings)
    wan = wan_model.load_transformer(settings.model)
    pairs = latents.LatentPairs(settings.data, wan.config)
    torch.manual_seed(settings.seed)
    if settings.lora:
        wan_model.load_adapters(wan, settings.lora)
    else:
        wan_model.add_adapters(wan, settings.rank)  # drawn on the CPU: the same on every device
    wan.enable_gradient_checkpointing()
    task = alignment_task(wan, pairs, settings, device)
    if settings.algo == "dpo" and is_main and state is None:
        check_start(task, device)
    lines = fit(task, settings, device, state)
    if is_main:
        print(*lines, sep="\n")
    distributed.stop_process()


if __name__ == "__main__":
    cli.run(main)
