"""Many processes, one run: `torchrun --nproc_per_node 8 train.py ...`, on PyTorch's own DDP and FSDP.

    without a flag   DDP: every process holds the whole model and averages its gradients with the others'
    --fsdp           weights, gradients, averages and the optimiser's state lie in slices, a slice a process; each block
                     is gathered when it runs. dpo's frozen reference stays whole in every process: it has no gradients
                     and no optimiser, and it may share its trunk with nothing that is sharded.

Both wrap one small module, Loss, whose forward is the task's loss: whatever entry points of a model a loss calls
(embed, run, head, features), it calls them inside this forward, where the hooks of DDP and FSDP are. Every process
builds the same model from the same seed, draws the same batch and works on its part of it (parts.py). Process 0 logs
and writes. Without torchrun all of this is one process, and nothing here does anything.
"""

import os
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common import pick_device
from model import Block
from reward import RewardBlock


def launched():
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def restarted():
    """Whether torchrun started this process again, after a fault (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start_process(name):
    """Joins the processes that torchrun started, if it did; the torch.device of this one."""
    if launched() and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, number, count = next(rendezvous("env://"))
        # after a restart the launcher's store still has the addresses of the processes before
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        hour = timedelta(hours=1)  # long enough for process 0 to write a large checkpoint while the others wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=hour)
    return device


def stop_process():
    """Leaves the others, once all are ready: process 0 has the closing table to make."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Until every process has come here."""
    if size() > 1:
        dist.barrier()


def everyone(value):
    """The list of every process's `value`, any small object, in every process."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def together(made, stop):
    """The mean loss and the mean of each log over the parts [(loss, logs)] of all processes, and whether any of them
    was told to stop. What a part could not measure, the accuracy in a quarter of t that it never met, is left out."""
    answers = everyone((made, stop))
    parts = [part for made, _ in answers for part in made]
    logs = {name: [] for _, logs in parts for name in logs}
    for name, values in logs.items():
        values.extend(here[name] for _, here in parts if name in here)
    logs = {name: sum(values) / len(values) for name, values in logs.items()}
    return sum(loss for loss, _ in parts) / len(parts), logs, any(stop for _, stop in answers)


class Loss(nn.Module):
    """forward(batch, part) is the task's loss; holds the model that is trained, so that DDP or FSDP finds it.

    bf16: matrices are multiplied in bfloat16; weights, sums and errors stay float32."""

    def __init__(self, task, bf16):
        super().__init__()
        self.model, self.task, self.bf16 = task.model, task, bf16

    def forward(self, batch, part):
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.task.loss(batch, part)


def spread(task, device, sharded, compiled, bf16):
    """The module to call for the loss, in all processes alike."""
    loss = Loss(task, bf16)
    blocks = [module for module in task.model.modules() if isinstance(module, Block | RewardBlock)]
    if compiled:
        for block in blocks:  # one by one: as fast as the whole model, and all alike are compiled once
            block.compile()
    if sharded:
        mesh = init_device_mesh(device.type, (size(),))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # times and rotary tables must stay float32
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(loss, mesh=mesh, mp_policy=policy)
    return DistributedDataParallel(loss) if size() > 1 else loss


def accumulating(loss, last):
    """A context for one micro-batch of several: all but the last keep their gradients to themselves."""
    if isinstance(loss, DistributedDataParallel):
        return nullcontext() if last else loss.no_sync()
    if hasattr(loss, "set_requires_gradient_sync"):
        loss.set_requires_gradient_sync(last)
    return nullcontext()


def own(tensor):
    """This process's slice of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """A sharded tensor gathered in every process, which all have to call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
