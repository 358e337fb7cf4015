"""A run on disk: what is saved, when it is whole, and how a run goes on from it.

    last.pt          one process or DDP: weights, averages, optimiser, step, settings (common.py has the format)
    shards-STEP/     --fsdp: the same in slices, written by torch.distributed.checkpoint, and run.json;
                     last.pt then is the whole model alone, written at the end, to sample from
    metrics.jsonl    a line a step, locked while a run writes it

All that is random in step n, and its place in the data, are functions of the seed and n (data.step_rng), so the step is
the state of every generator. A process may be killed at any moment: a checkpoint gets its name when it is whole and on
the disk, and only then is the one before removed; the log is on the disk before the checkpoint whose steps it holds,
and what it has beyond is cut off, in place, when the run goes on.
"""

import copy
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common import BadInput, fsync_folder, load_checkpoint, save_checkpoint
from distributed import rank, whole

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None

# Flags that a resumed run may change
UNSETTLED = {"resume", "out", "cache", "save_every", "device", "export", "eval_prompts", "eval_pairs", "eval_seed"}
UNSETTLED |= {"plan", "flops"}


def settled(args):
    return {name: str(value) for name, value in vars(args).items() if name not in UNSETTLED}


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def newest(out):
    """The last checkpoint in a run's folder, or None."""
    shards = sorted(out.glob("shards-[0-9]*"), key=lambda path: int(path.name[7:]))
    return shards[-1] if shards else out / "last.pt" if (out / "last.pt").exists() else None


def refuse_used(args):
    """BadInput if --out holds a run already, whose checkpoint this one would overwrite."""
    if not args.resume and newest(args.out):
        raise BadInput(f"{newest(args.out)}: a run is there already; continue it by --resume, or give another --out")


def open_log(out, start, need):
    """metrics.jsonl, cut after its first `start` lines, to append to; nobody else's until it is closed. BadInput where
    another run writes it, the folder cannot be written, or has no room for a checkpoint of `need` bytes."""
    if rank():
        return open(os.devnull, "w")
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "metrics.jsonl", "a+")
        _lock(log, out)
        log.seek(0)
        log.truncate(sum(len(line) for _, line in zip(range(start), iter(log.readline, ""))))
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None
    need *= 1 if newest(out) else 2  # the next one is written beside the last
    if free < need:
        raise BadInput(f"{out}: {free / 1e9:.2f} GB free, but checkpoints will take {need / 1e9:.2f} GB")
    return log


def _lock(log, out):
    try:
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system takes it back when the process ends, however
    except BlockingIOError:
        raise BadInput(f"{out}: another run is writing there; give another --out") from None
    except OSError:
        pass  # a file system without locks


def write_log(log, line, sync=False):
    """Appends a line; with `sync` everything so far is on the disk afterwards. OSError if that is full."""
    log.write(line)
    if sync and not rank():
        log.flush()
        os.fsync(log.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def averaged(model, average):
    """`model`, or a copy of it with the averaged weights where there are any."""
    if average:
        model = copy.deepcopy(model)
        model.load_state_dict(average, strict=False)
    return model


def gathered(model, average, spare):
    """A sharded model whole again, with the averaged weights where there are any: `spare` in process 0, which is a
    model like it on the CPU, and None in the others. All processes have to call this."""
    for name, value in model.state_dict().items():
        full = whole(average.get(name, value))
        if spare is not None:
            spare.state_dict()[name].copy_(full)
    return spare


def facts(task, step):
    config = asdict(task.model.config)
    return {"kind": task.kind, "config": config, "vocabulary": task.vocabulary.words, "step": step}


def save_whole(args, task, step, trained, average, optimizer, final=None):
    """Writes last.pt. `final`: the finished model, where the averaged weights' buffers were set after training."""
    if rank():
        return
    state = {**facts(task, step), "settings": settled(args), "optimizer": optimizer.state_dict()}
    state["model"] = task.stored(task.plain(task.model))
    if average:
        state["ema"] = task.stored(final or task.plain(averaged(task.model, average)))
    if task.adapted:
        state |= {"trained": {name: value.detach() for name, value in trained.items()}, "averaged": average}
    save_checkpoint(args.out / "last.pt", state)


def run_tensors(trained, average, optimizer):
    """All tensors of a sharded run by name; the optimiser's are made where it has none yet."""
    tensors = {f"model.{name}": value.detach() for name, value in trained.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, value in trained.items():
        state = optimizer.state[value]
        if not state:
            state["step"] = torch.zeros((), device=value.device)
            state |= {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"{key}.{name}": tensor for key, tensor in state.items()}
    return tensors


def save_shards(args, task, step, trained, average, optimizer):
    """Writes shards-STEP, every process its slices; then the folders of earlier steps go."""
    unfinished, done = args.out / "shards.tmp", args.out / f"shards-{step}"
    try:
        if not rank():
            shutil.rmtree(unfinished, ignore_errors=True)
        dist.barrier()
        dcp.save(run_tensors(trained, average, optimizer), checkpoint_id=unfinished)
        if rank():
            return
        with open(unfinished / "run.json", "w") as file:
            json.dump({**facts(task, step), "settings": settled(args)}, file)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(unfinished)
        unfinished.rename(done)
        fsync_folder(args.out)
        for old in args.out.glob("shards-[0-9]*"):
            if old != done:
                shutil.rmtree(old)
    except OSError as error:
        raise BadInput(f"cannot write {done}: {error.strerror}") from None
    except dcp.api.CheckpointException as error:
        fault = next(iter(error.failures.values()))[0]
        raise BadInput(f"cannot write {done}: {fault}".split("\n")[0]) from None


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def interrupted_run(args):
    """The checkpoint that --resume goes on from. BadInput if there is none, or if its run had other settings."""
    path = newest(args.out) or args.out / "last.pt"
    state = _read_run(path) if path.is_dir() else load_checkpoint(path)
    if not path.is_dir() and "optimizer" not in state:
        raise BadInput(f"{path}: weights without the optimiser's state; it can be used with --init, not with --resume")
    if not isinstance(state.get("settings"), dict) or not isinstance(state.get("step"), int):
        raise BadInput(f"{path}: lacks the settings of its run; it was not written by train.py")
    for name, value in settled(args).items():
        was = state["settings"].get(name)
        if was != value:
            raise BadInput(f"--resume: --{name.replace('_', '-')} was {was} in {path}, now {value}; use the same")
    return state | {"path": path}


def _read_run(path):
    try:
        return json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        raise BadInput(f"{path}: its run.json is missing or damaged; remove the folder to start anew") from None


def _like(value, wanted):
    if value.shape != wanted.shape:
        raise ValueError(f"a tensor of {tuple(value.shape)} where {tuple(wanted.shape)} is needed")
    return value


def restore(state, trained, average, optimizer):
    """Loads a run's state into its tensors; returns the step it had reached."""
    path = state.get("path", "the checkpoint")
    if "optimizer" not in state:
        load_shards(path, run_tensors(trained, average, optimizer))
        return state["step"]
    sources = {"trained": trained, "averaged": average} if "trained" in state else {"model": trained, "ema": average}
    try:
        with torch.no_grad():
            for source, tensors in sources.items():
                for name, value in tensors.items():
                    value.copy_(_like(state[source][name], value))
        optimizer.load_state_dict(state["optimizer"])
        for value in trained.values():
            for key in ("exp_avg", "exp_avg_sq"):
                _like(optimizer.state[value].get(key, value), value)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path}: does not hold the state of this model's training ({error})".split("\n")[0]) from None
    return state["step"]


class SafeReader(dcp.FileSystemReader):
    """Reads shards without running code: torch unpickles their index with all that pickle may do, this one admits the
    few names that an index of tensors is made of."""

    NAMES = {
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "bfloat16", "float16"},
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name not in SafeReader.NAMES.get(module, ()):
                raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
            return super().find_class(module, name)

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = self.Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_shards(path, tensors):
    """Loads shards-STEP into tensors of the same names and shapes, whatever the number of processes that wrote it."""
    try:
        dcp.load(tensors, storage_reader=SafeReader(path))
    except (OSError, pickle.UnpicklingError, dcp.api.CheckpointException, EOFError, RuntimeError) as error:
        fault = next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error
        raise BadInput(f"{path}: cannot be read as shards of this run ({fault})".split("\n")[0]) from None
