"""A run on disk: what is saved, when it is whole, and how a run goes on from it.

    last.pt          one process or DDP: weights, averages, optimiser, step, settings (runtime/checkpoint.py)
    shards-STEP/     --fsdp: the same in slices, written by torch.distributed.checkpoint, and run.json;
                     last.pt then is the whole model alone, written at the end, to sample from
    metrics.jsonl    a line a step, locked while a run writes it

All that is random in step n, and its place in the data, are functions of the seed and n (data.step_rng), so the step is
the state of every generator. A process may be killed at any moment: a checkpoint gets its name when it is whole and on
the disk, and only then is the one before removed; the log is on the disk before the checkpoint whose steps it holds,
and what it has beyond is cut off, in place, when the run goes on.
"""

import copy
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from runtime.checkpoint import WEIGHTS, fsync_folder, load_checkpoint, save_checkpoint
from runtime.cli import BadInput, check_writable
from runtime.config import flags_of, option
from runtime.distributed import full_tensor, rank, restarted
from runtime.schedule import check_longer

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None


def settled(settings):
    """What makes a run what it is, as text: the flags that a resumed run may not change, and the
    digests of the files they name."""
    values = {}
    for name, about in flags_of(type(settings)).items():
        if not about["resumable"]:
            values[name] = str(getattr(settings, name)).replace(str(WEIGHTS), WEIGHTS.name)
    return values | settings.digests


def digests(settings):
    """{"FLAG sha256": digest} of the files that a run reads: of a CSV, not of its videos. A file that
    cannot be read is left out; its reader says why."""
    found = {}
    for name, about in flags_of(type(settings)).items():
        if about["file"] and getattr(settings, name):
            with suppress(OSError), open(getattr(settings, name), "rb") as file:
                found[f"{name} sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def commit():
    """The commit of the code, with "+" behind it if files differ from it; "" outside a repository."""
    try:
        git = ["git", "-C", str(WEIGHTS.parent)]
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
        return name.stdout.strip() + "+" * bool(changed.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---------------------------------------------------------------------------------------------
# The folder


def last_checkpoint(out):
    """The last checkpoint in a run's folder, or None."""
    shards = sorted(out.glob("shards-[0-9]*"), key=lambda path: int(path.name[7:]))
    return shards[-1] if shards else out / "last.pt" if (out / "last.pt").exists() else None


def last_state(out):
    """What a run that fails says of what it leaves."""
    last = last_checkpoint(out)
    if last is None:
        return "nothing was saved yet"
    steps = int(last.name[7:]) if last.is_dir() else load_checkpoint(last)["step"]
    return f"{last}, after step {steps - 1}, is the last good state"


def resumes(settings):
    """Whether a run goes on from the checkpoint in --out."""
    return settings.resume or (restarted() and last_checkpoint(settings.out) is not None)


def opened_run(settings):
    """What --resume goes on from, None for a new run. BadInput if --out holds a run that this one would overwrite, if
    there is nothing to go on from, or if --export cannot be written."""
    if settings.export and not rank():
        check_writable(settings.export.parent, "--export")
    settings.digests = digests(settings)
    last = last_checkpoint(settings.out)
    if resumes(settings):
        return interrupted_run(settings)
    if last:
        raise BadInput(
            f"{last}: a run is there already; continue it by --resume, or give another --out"
        )
    return None


class Log:
    """metrics.jsonl, cut after its first `start` lines, to append to; nobody else's until it is closed. BadInput where
    another run writes it, the folder cannot be written, or has no room for the checkpoints of a model."""

    def __init__(self, settings, start, model, trained, extra_bytes=0):
        self.out, self.file = settings.out, None
        if rank():
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out / "metrics.jsonl", "a+")
            _lock(self.file, self.out)
            self.file.seek(0)
            self.file.truncate(
                sum(len(line) for _, line in zip(range(start), iter(self.file.readline, "")))
            )
            free = shutil.disk_usage(self.out).free
        except OSError as error:
            raise BadInput(f"cannot write to {self.out}: {error.strerror}") from None
        num_params = sum(map(torch.numel, model.parameters()))
        num_trained = sum(map(torch.numel, trained.values()))
        need = 4 * (
            num_params + (3 if settings.ema else 2) * num_trained
        )  # weights, AdamW's two, averages
        need *= 1 if last_checkpoint(self.out) else 2  # the next one is written beside the last
        need += extra_bytes  # of what an algorithm keeps beside them
        if free < need:
            raise BadInput(
                f"{self.out}: {free / 1e9:.2f} GB free, but checkpoints will take {need / 1e9:.2f} GB"
            )

    def write(self, record, sync=False):
        """Appends a line; with `sync` everything so far is on the disk afterwards."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(record) + "\n")
            if sync:
                self.file.flush()
                os.fsync(self.file.fileno())
        except OSError as error:
            raise self.fault(error) from None

    def fault(self, error):
        return BadInput(
            f"cannot write {self.out / 'metrics.jsonl'}: {error.strerror}; {last_state(self.out)}"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            if self.file is not None:
                self.file.close()
        except OSError as error:  # what was buffered finds no room
            raise self.fault(error) from None


def _lock(log, out):
    try:
        if fcntl:
            fcntl.flock(
                log, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system takes it back when the process ends, however
    except BlockingIOError:
        raise BadInput(f"{out}: another run is writing there; give another --out") from None
    except OSError:
        pass  # a file system without locks


_stop = []  # signals that came inside stop_requests


@contextmanager
def stop_requests():
    """Inside, SIGINT and SIGTERM are kept in a list instead of ending the process."""
    _stop.clear()
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: _stop.append(number)) for number in signals]
    try:
        yield _stop
    finally:
        _stop.clear()
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)


def until_stopped(items, out):
    """`items`, one by one; a stop request ends the run before the next one, with status 130."""
    for item in items:
        if _stop:
            print(f"stopped; {last_state(out)}")
            sys.exit(130)
        yield item


# ---------------------------------------------------------------------------------------------
# Saving


def final_model(settings, model, ema, unsharded):
    """`model` with its averaged weights, where there are any: a copy then; under --fsdp whole again as `unsharded` in
    process 0, and None in the others. All processes have to call this."""
    if settings.fsdp:
        for name, value in model.state_dict().items():
            full = full_tensor(ema.get(name, value))
            if unsharded is not None:
                unsharded.state_dict()[name].copy_(full)
        return unsharded
    if ema:
        model = copy.deepcopy(model)
        model.load_state_dict(ema, strict=False)
    return model


def facts(task, step):
    return {
        "kind": task.kind,
        "config": asdict(task.model.config),
        "vocabulary": task.words,
        "step": step,
    }


def save_run(settings, task, step, trained, ema, optimizer):
    """Writes a state to go on from: last.pt, or the processes' shards."""
    if settings.fsdp:
        save_shards(settings, task, step, trained, ema, optimizer)
    else:
        final = final_model(settings, task.model, ema, None)
        save_whole(settings, task, step, trained, ema, optimizer, final, evaluated=False)


def save_final(settings, task, final, trained, ema, optimizer, lines):
    """Writes last.pt once more, with what the evaluation measured (the reward's z-score constants), and --export;
    returns the closing table's lines and others that say so. The table is printed even if a write fails."""
    last = settings.out / "last.pt"
    try:
        if settings.fsdp:
            save_weights(last, settings, task, final, evaluated=True)
        else:
            save_whole(
                settings, task, settings.steps, trained, ema, optimizer, final, evaluated=True
            )
        if settings.export:
            save_weights(settings.export, settings, task, final, evaluated=True, half=True)
            lines = [*lines, f"wrote {settings.export}"]
    except BadInput:
        print("\n".join(["", *lines]))
        raise
    return [*lines, f"wrote {settings.out / 'metrics.jsonl'}", f"wrote {last}"]


def save_weights(path, settings, task, final, evaluated, half=False):
    """Writes a model alone, as float16 if `half`."""
    model = task.state_dict(final)
    if half:
        model = {name: value.half() for name, value in model.items()}
    about = {"settings": settled(settings), "commit": commit(), "evaluated": evaluated}
    save_checkpoint(path, {**facts(task, settings.steps), "model": model, **about})


def save_whole(settings, task, step, trained, ema, optimizer, final, evaluated):
    """Writes last.pt; final: the model with the averaged weights."""
    if rank():
        return
    state = {
        **facts(task, step),
        "settings": settled(settings),
        "optimizer": optimizer.state_dict(),
    }
    state |= {"model": task.state_dict(task.model), "evaluated": evaluated}
    if ema:
        state["ema"] = task.state_dict(final)
    if not trained.keys() <= state["model"].keys():  # adapters, which are merged into what is saved
        state |= {
            "trained": {name: value.detach() for name, value in trained.items()},
            "averaged": ema,
        }
    save_checkpoint(settings.out / "last.pt", state)


def run_tensors(trained, ema, optimizer):
    """All tensors of a sharded run by name; the optimiser's are made where it has none yet."""
    tensors = {f"model.{name}": value.detach() for name, value in trained.items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for name, value in trained.items():
        state = optimizer.state[value]
        if not state:
            state["step"] = torch.zeros((), device=value.device)
            state |= {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"{key}.{name}": tensor for key, tensor in state.items()}
    return tensors


def save_shards(settings, task, step, trained, ema, optimizer):
    """Writes shards-STEP, every process its slices; then the folders of earlier steps go."""
    unfinished, done = settings.out / "shards.tmp", settings.out / f"shards-{step}"
    try:
        if not rank():
            shutil.rmtree(unfinished, ignore_errors=True)
        dist.barrier()
        dcp.save(run_tensors(trained, ema, optimizer), checkpoint_id=unfinished)
        if rank():
            return
        with open(unfinished / "run.json", "w") as file:
            json.dump({**facts(task, step), "settings": settled(settings)}, file)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(unfinished)
        unfinished.rename(done)
        fsync_folder(settings.out)
        for old in settings.out.glob("shards-[0-9]*"):
            if old != done:
                shutil.rmtree(old)
    except OSError as error:
        raise BadInput(f"cannot write {done}: {error.strerror}") from None
    except dcp.api.CheckpointException as error:
        fault = next(iter(error.failures.values()))[0]
        raise BadInput(f"cannot write {done}: {fault}".split("\n")[0]) from None


# ---------------------------------------------------------------------------------------------
# Going on


def interrupted_run(settings):
    """The checkpoint that --resume goes on from. BadInput if there is none, or if its run had other settings."""
    path = last_checkpoint(settings.out) or settings.out / "last.pt"
    state = _read_run(path) if path.is_dir() else load_checkpoint(path)
    if not path.is_dir() and "optimizer" not in state:
        raise BadInput(
            f"{path}: weights without the optimiser's state; it can be used with --init, not with --resume"
        )
    if not isinstance(state.get("settings"), dict) or not isinstance(state.get("step"), int):
        raise BadInput(f"{path}: lacks the settings of its run; it was not written by train.py")
    before = state["settings"]
    if settings.pairs_of_steps and str(before.get("pairs")).isdigit():
        settings.pairs = int(before["pairs"])  # also where --steps has grown
    for name, value in settled(settings).items():
        was, flag = before.get(name), name.removesuffix(" sha256")
        if was == value or (
            was is None and name != flag
        ):  # a checkpoint of before there were digests
            continue
        if name != flag:
            fault = f"{getattr(settings, flag)} (--{flag}) has changed since {path} was written"
            raise BadInput(f"--resume: {fault}; put it back, or start anew with another --out")
        if name == "steps" and str(was).isdigit():
            check_longer(settings, state["step"], int(was))
        else:
            raise BadInput(
                f"--resume: {option(name)} was {was} in {path}, now {value}; use the same"
            )
    return state | {"path": path}


def read_own(path, settings):
    """A file that this run saved with its settings, a dict; None if there is none of this run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["settings"] == settled(settings) else None
    except Exception:  # not there, or damaged: torch can raise anything
        return None


def _read_run(path):
    try:
        return json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        raise BadInput(
            f"{path}: its run.json is missing or damaged; remove the folder to start anew"
        ) from None


def _like(value, wanted):
    if value.shape != wanted.shape:
        raise ValueError(f"a tensor of {tuple(value.shape)} where {tuple(wanted.shape)} is needed")
    return value


def restore(state, trained, ema, optimizer):
    """Loads a run's state into its tensors; returns the step it had reached."""
    path = state.get("path", "the checkpoint")
    if "optimizer" not in state:
        load_shards(path, run_tensors(trained, ema, optimizer))
        return state["step"]
    sources = (
        {"trained": trained, "averaged": ema}
        if "trained" in state
        else {"model": trained, "ema": ema}
    )
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
        raise BadInput(
            f"{path}: does not hold the state of this model's training ({error})".split("\n")[0]
        ) from None
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

    def read_metadata(self, *settings, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = self.Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_shards(path, tensors):
    """Loads shards-STEP into tensors of the same names and shapes, whatever the number of processes that wrote it."""
    try:
        dcp.load(tensors, storage_reader=SafeReader(path))
    except (
        OSError,
        pickle.UnpicklingError,
        dcp.api.CheckpointException,
        EOFError,
        RuntimeError,
    ) as error:
        fault = next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error
        raise BadInput(
            f"{path}: cannot be read as shards of this run ({fault})".split("\n")[0]
        ) from None
