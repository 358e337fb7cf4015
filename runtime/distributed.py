"""One run on many GPUs: `torchrun --nproc_per_node 8 train.py ...`, by PyTorch's DDP and FSDP.

DDP, the default, averages gradients. FSDP shards weights, gradients, averages and the optimiser's
state; Flow-DPO's frozen reference stays whole. Every process builds the same model, draws the same
noise and times for the whole batch, and works on its rows. Process 0 logs and saves.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from runtime.cli import BadInput, pick_device
from runtime.device import has_bf16

_patient = None  # a group of all processes, whose barrier waits as long as it takes
_in_block = False  # of process_0_first


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_process(name):
    """Joins the processes of torchrun, if there are any -> this process's torch.device."""
    global _patient
    if "LOCAL_RANK" not in os.environ:
        return pick_device(name)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device, backend = pick_device(name), "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(hours=1))  # a checkpoint may take long
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    return device


def wait_for_all():
    """Waits for the other processes; ends this one with status 2 if one of them has ended."""
    try:
        dist.barrier(_patient)
    except RuntimeError:
        sys.exit(2)


def stop_process():
    """Leaves the other processes, once process 0 has made the closing table."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()


@contextmanager
def process_0_first():
    """Process 0 runs the block, then all others run it: they wait without a timeout, as decoding
    can take hours. A block inside another one does not wait, as it may be process 0's alone."""
    global _in_block
    if _in_block or world_size() == 1:
        yield
        return
    _in_block = True
    if rank():
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()
    _in_block = False


def check_flags(settings):
    """BadInput for flags that do not go with this number of processes."""
    parts = world_size() * settings.accum
    if settings.batch % parts:
        raise BadInput(
            f"--batch {settings.batch}: must be a multiple of {parts}, processes x --accum"
        )
    if settings.fsdp and not dist.is_initialized():
        raise BadInput("--fsdp: needs processes; start with torchrun --nproc_per_node N train.py")


def local_rows(batch):
    """This process's slice of a batch's rows."""
    share = batch // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def reduce_logs(micro_losses, stop):
    """[(loss, logs)] of this process's micro-batches, and whether it was told to stop -> the mean
    loss, the mean of each log, and whether any was told to stop, over all processes.

    A micro-batch may lack a log: the accuracy in a quarter of t that it has no sample in."""
    gathered = [(micro_losses, stop)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, (micro_losses, stop))
    micro_losses = sum((losses for losses, _ in gathered), [])
    values = {}
    for _, logs in micro_losses:
        for name, value in logs.items():
            values.setdefault(name, []).append(value)
    loss = sum(loss for loss, _ in micro_losses) / len(micro_losses)
    logs = {name: sum(each) / len(each) for name, each in values.items()}
    return loss, logs, any(stop for _, stop in gathered)


class Loss(nn.Module):
    """forward(batch) is the task's loss. Holds the trained model, so that DDP or FSDP finds it.

    bf16: matrices are multiplied in bfloat16; weights, sums and errors stay float32."""

    def __init__(self, task, device, bf16):
        super().__init__()
        self.model, self.task, self.device, self.bf16 = task.model, task, device, bf16

    def forward(self, batch):
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self.task.loss(batch)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            fault = f"torch.compile failed ({str(error).splitlines()[0]})"
            raise BadInput(f"--compile: {fault}; leave the flag out") from None


def in_bf16(settings, device):
    return settings.precision == "bfloat16" or (settings.precision == "auto" and has_bf16(device))


def wrap_model(task, device, settings):
    """The module to call for the loss, as --compile, --grad-checkpoint and --fsdp demand."""
    loss = Loss(task, device, in_bf16(settings, device))
    modules = list(task.model.modules())
    blocks = [block for module in modules for block in getattr(module, "blocks", [])]
    for module in modules:
        if hasattr(module, "grad_checkpoint"):
            module.grad_checkpoint = settings.grad_checkpoint
    if settings.compile:
        for block in blocks:  # all blocks share one compilation
            block.compile()
    if settings.fsdp:
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # t and rotary tables: float32
        for module in (*blocks, loss):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        return loss
    return DistributedDataParallel(loss) if world_size() > 1 else loss


def average_gradients(loss, enabled):
    """Whether the next backward averages gradients over processes."""
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(enabled)
    loss.require_backward_grad_sync = enabled  # read by DDP


def full_tensor(tensor):
    """A sharded tensor gathered, which all processes must do together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor):
    """A sharded tensor, whole on process 0's CPU, and None in the others; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return None if rank() else whole.cpu()


def shard_like(whole, tensor):
    """A whole tensor, which every process has, sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
