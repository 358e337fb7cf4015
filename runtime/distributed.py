"""Many processes, one run: `torchrun --nproc_per_node 8 train.py ...`, on PyTorch's own DDP and FSDP.

    without a flag   DDP: every process holds the whole model and averages its gradients with the others'
    --fsdp           weights, gradients, averages and the optimiser's state lie in slices, a slice a process; each block
                     is gathered when it runs. dpo's frozen reference stays whole in every process: it has no gradients
                     and no optimiser, and it may share its trunk with nothing that is sharded.

Both wrap one small module, Loss, whose forward is the task's loss: whatever entry points of a model a loss calls
(embed, run, head, features), it calls them inside this forward, where the hooks of DDP and FSDP are. Every process
builds the same model from the same seed, draws the same noise and times for the whole batch and works on its rows.
Process 0 logs and writes. Without torchrun all of this is one process, and nothing here does anything.
"""

import os
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from runtime.cli import BadInput, has_bf16, pick_device

_store = None  # key-value store that all processes share
_num_blocks = 0  # blocks of process_0_first entered so far
_in_block = False


def launched():
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def restarted():
    """Whether torchrun started this process again, after a fault (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start_process(name):
    """Joins the processes that torchrun started, if it did; the torch.device of this one."""
    global _store
    if launched() and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, number, count = next(rendezvous("env://"))
        # after a restart the launcher's store still has the addresses of the processes before
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        hour = timedelta(
            hours=1
        )  # long enough for process 0 to write a large checkpoint while the others wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=hour)
        _store = store
    return device


def stop_process():
    """Leaves the others, once all are ready: process 0 has the closing table to make."""
    with process_0_first():
        pass
    if dist.is_initialized():
        dist.barrier()  # the store may be process 0's, and the others have read it only now
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def check_flags(settings):
    """BadInput for flags that do not go with this number of processes."""
    parts = world_size() * settings.accum
    if settings.batch % parts:
        raise BadInput(
            f"--batch {settings.batch}: must be a multiple of {parts}, that is of processes x --accum"
        )
    if settings.fsdp and not launched():
        raise BadInput(
            "--fsdp: shards over the processes of torchrun; start with torchrun --nproc_per_node N train.py"
        )


def local_rows(batch):
    """The slice of a batch's rows that are this process's."""
    share = batch // world_size()
    return slice(rank() * share, (rank() + 1) * share)


@contextmanager
def process_0_first():
    """Process 0 runs the block, then all others run it. They wait without a timeout, as decoding
    can take hours; if process 0 fails they end with status 2.

    A block inside another one does not wait: process 0 may be the only one that reaches it."""
    global _num_blocks, _in_block
    if world_size() == 1 or _in_block:
        yield
        return
    _num_blocks += 1
    key = f"block {_num_blocks} of process 0"
    if rank():
        _wait_for(key)
    _in_block, outcome = True, "failed"
    try:
        yield
        outcome = "done"
    finally:
        _in_block = False
        if rank() == 0:
            _store.set(key, outcome)


def _wait_for(key):
    try:
        while not _store.check([key]):
            time.sleep(0.1)
        done = _store.get(key) == b"done"
    except RuntimeError:  # process 0 has ended, and its store with it
        done = False
    if not done:
        sys.exit(2)


def all_gather(value):
    """The list of every process's `value`, any small object, in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_logs(micro_losses, stop):
    """The mean loss and the mean of each log over the micro-batches [(loss, logs)] of all processes, and whether any of
    them was told to stop. What one could not measure, the accuracy in a quarter of t it never met, is left out."""
    gathered = all_gather((micro_losses, stop))
    micro_losses = [each for losses, _ in gathered for each in losses]
    values = {}
    for _, logs in micro_losses:
        for name, value in logs.items():
            values.setdefault(name, []).append(value)
    logs = {name: sum(each) / len(each) for name, each in values.items()}
    return (
        sum(loss for loss, _ in micro_losses) / len(micro_losses),
        logs,
        any(stop for _, stop in gathered),
    )


class Loss(nn.Module):
    """forward(batch) is the task's loss; holds the model that is trained, so that DDP or FSDP finds it.

    bf16: matrices are multiplied in bfloat16; weights, sums and errors stay float32."""

    def __init__(self, task, bf16):
        super().__init__()
        self.model, self.task, self.bf16 = task.model, task, bf16

    def forward(self, batch):
        device = next(iter(batch.values())).device.type
        try:
            with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
                return self.task.loss(batch)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            fault = str(error).splitlines()[0]
            raise BadInput(
                f"--compile: torch.compile failed ({fault}); leave the flag out"
            ) from None


def in_bf16(settings, device):
    return settings.precision == "bfloat16" or (settings.precision == "auto" and has_bf16(device))


def wrap_model(task, device, settings):
    """The module to call for the loss, in all processes alike, as --compile, --grad-checkpoint and --fsdp have it."""
    loss = Loss(task, in_bf16(settings, device))
    modules = list(task.model.modules())
    blocks = [block for module in modules for block in getattr(module, "blocks", [])]
    for module in modules:
        if hasattr(module, "checkpointed"):
            module.checkpointed = settings.grad_checkpoint
    if settings.compile:
        for (
            block
        ) in blocks:  # one by one: as fast as the whole model, and all alike are compiled once
            block.compile()
    if settings.fsdp:
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = MixedPrecisionPolicy(
            cast_forward_inputs=False
        )  # times and rotary tables must stay float32
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(loss, mesh=mesh, mp_policy=policy)
    return DistributedDataParallel(loss) if world_size() > 1 else loss


def accumulating(loss, last):
    """A context for one micro-batch of several: all but the last keep their gradients to themselves."""
    if isinstance(loss, DistributedDataParallel):
        return nullcontext() if last else loss.no_sync()
    if hasattr(loss, "set_requires_gradient_sync"):
        loss.set_requires_gradient_sync(last)
    return nullcontext()


def to_local(tensor):
    """This process's slice of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor):
    """A sharded tensor gathered in every process, which all have to call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def update_ema(ema, trained, decay):
    """ema <- decay ema + (1 - decay) trained, for dicts of tensors with the same names."""
    new = [to_local(value) for value in trained.values()]
    torch._foreach_lerp_([to_local(value) for value in ema.values()], new, 1 - decay)
