"""The training command. Algorithms are in tasks.py and online/, their flags in settings.py.

python train.py --algo dpo          align the base model with VideoReward; ends with a table
python train.py --algo rwr          the same by reward-weighted regression; or sft
python train.py --algo pretrain     the base model from nothing (flow matching, section 4.1)
python train.py --algo reward       VideoReward from nothing (section 3.2)
python train.py --algo nrg          the noise-aware reward for guidance (section 4.4)
python train.py --algo nft          online alignment on the policy's own clips; or grpo
torchrun --nproc_per_node 8 train.py --algo pretrain --preset large --fsdp --data latents.csv
                                    on eight GPUs, and on latents, which base and large take
"""

import time

from online.tasks import task_of
from runtime import distributed, resume
from runtime.cli import run
from runtime.distributed import rank, world_size
from settings import settings_of
from trainer import fit


def headline(model, settings, device):
    num_params = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = f"{device}" if world_size() == 1 else f"{world_size()} processes on {device.type}"
    return (
        f"{settings.algo}: {num_params / 1e6:.2f} M parameters, {num_trained / 1e6:.2f} M trained, "
        f"{settings.precision} on {where}, {settings.steps} steps of {settings.batch}, "
        f"lr {settings.lr:g}, seed {settings.seed}"
    )


def main():
    settings = settings_of()
    device, begun = distributed.start_process(settings.device), time.perf_counter()
    distributed.check_flags(settings)
    settings.precision = "bfloat16" if distributed.in_bf16(settings, device) else "float32"
    state = resume.opened_run(settings)
    task = task_of(settings, device)
    if rank() == 0:
        print(headline(task.model, settings, device))
    lines = fit(task, settings, device, state)
    if rank() == 0:
        print("\n".join(["", *lines]) + f" in {(time.perf_counter() - begun) / 60:.1f} minutes")
    distributed.stop_process()


if __name__ == "__main__":
    run(main)
