"""Training: what each algorithm trains on, and the command. The loop is in trainer.py.

python train.py --algo dpo          align the shipped base model with the shipped VideoReward; ends with a table
python train.py --algo rwr          the same by reward-weighted regression, or --algo sft on the winners alone
python train.py --algo pretrain     the base model from nothing (flow matching, section 4.1)
python train.py --algo reward       VideoReward from nothing (section 3.2)
python train.py --algo nft          online alignment on the policy's own clips, as --algo dpo --rounds 10 (online/)
python train.py --algo nrg          the noise-aware reward for guidance, on the base model's first blocks (4.4)
torchrun --nproc_per_node 8 train.py --algo pretrain --preset large --fsdp --data latents/pairs.csv
                                    on eight GPUs, and on latents: base and large are made for them
"""

import time

from online.rounds import online_task
from runtime import distributed, resume
from runtime.cli import run
from runtime.distributed import rank, world_size
from settings import settings_of
from studies import cost
from tasks import TASKS
from trainer import fit


def task_of(settings, device):
    if getattr(settings, "rounds", None):
        return online_task(settings, device)
    return TASKS[settings.algo](settings, device)


def main():
    settings = settings_of()
    if settings.plan:
        print("\n".join(cost.plan(settings)))
        return
    device, begun = distributed.start_process(settings.device), time.perf_counter()
    distributed.check_flags(settings)
    settings.precision = "bfloat16" if distributed.in_bf16(settings, device) else "float32"
    state = resume.opened_run(settings)
    task = task_of(settings, device)
    if rank() == 0:
        num_params = sum(p.numel() for p in task.model.parameters())
        num_trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        where = f"{device}" if world_size() == 1 else f"{world_size()} processes on {device.type}"
        print(
            f"{settings.algo}: {num_params / 1e6:.2f} M parameters, {num_trained / 1e6:.2f} M trained, ",
            end="",
        )
        print(
            f"{settings.precision} on {where}, {settings.steps} steps of {settings.batch}, lr {settings.lr:g}, seed {settings.seed}"
        )
    lines = fit(task, settings, device, state)
    if rank() == 0:
        print("\n".join(["", *lines]) + f" in {(time.perf_counter() - begun) / 60:.1f} minutes")
    distributed.stop_process()


if __name__ == "__main__":
    run(main)
