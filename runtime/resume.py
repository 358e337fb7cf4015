"""A run on disk: checkpoints are atomic, and you can kill a run at any time.

    last.pt         weights, the optimiser's state, step and settings (checkpoint.py)
    metrics.jsonl   one line a step; locked while a run writes it

All randomness of step n, and its place in the data, comes from the seed and n, so a run resumes bit
for bit from its step. Lines of the log beyond the checkpoint are cut off when the run resumes.
"""

import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict

import torch

from flags import flags_of, option
from runtime.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from runtime.cli import BadInput, check_writable
from runtime.distributed import gather, rank, shard_like

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None


def settled(settings):
    """The flags that a resumed run may not change, and the digests of the files they name."""
    values = {}
    for name, about in flags_of(type(settings)).items():
        if not about["resumable"]:
            values[name] = str(getattr(settings, name)).replace(str(WEIGHTS), WEIGHTS.name)
    return values | settings.digests


def digests(settings):
    """{"FLAG sha256": digest} of the files that a run reads: of a CSV, not of its videos. A file
    that cannot be read is left out; its reader says why."""
    found = {}
    for name, about in flags_of(type(settings)).items():
        if about["file"] and getattr(settings, name):
            with suppress(OSError), open(getattr(settings, name), "rb") as file:
                found[f"{name} sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def last_state(out):
    """Where the last good state of a run is, for messages."""
    last = out / "last.pt"
    return f"{last} is the last good state" if last.exists() else "nothing was saved yet"


def resumes(settings):
    """Whether a run resumes: by --resume, or as torchrun --max-restarts has started it again."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return settings.resume or (restarted and (settings.out / "last.pt").exists())


def opened_run(settings):
    """The checkpoint to resume from; None for a new run. BadInput if --out holds a run of other
    settings or inputs, or one that this run would overwrite, or if --export cannot be written."""
    if settings.export and not rank():
        check_writable(settings.export.parent, "--export")
    settings.digests, last = digests(settings), settings.out / "last.pt"
    if not resumes(settings):
        if last.exists():
            raise BadInput(f"{last}: a run is there already; give --resume, or another --out")
        return None
    state = load_checkpoint(last)
    if "training" not in state:
        raise BadInput(f"{last}: holds weights alone; use them with --init, not with --resume")
    before = state["settings"]
    if settings.pairs_of_steps and "pairs" in before:
        settings.pairs = int(before["pairs"])  # also where --steps has grown
    for name, value in settled(settings).items():
        was, flag = before.get(name), name.removesuffix(" sha256")
        if was == value:
            continue
        if name == "steps":
            check_longer(settings, state["step"], int(was))
        elif name == flag:
            raise BadInput(
                f"--resume: {option(name)} was {was} in {last}, now {value}; use the same"
            )
        else:
            fault = f"{getattr(settings, flag)} (--{flag}) has changed since {last} was written"
            raise BadInput(f"--resume: {fault}; put it back, or give another --out")
    return state


def warmup_steps(steps):
    """In these first steps of a run the learning rate rises."""
    return min(100, max(1, steps // 10))


def check_longer(settings, done, steps):
    """BadInput unless a run of `steps` steps, of which some are done, can go on to settings.steps:
    what is left must be at the constant learning rate in both."""
    rate_rises = done + 1 < warmup_steps(settings.steps)
    rounds = getattr(settings, "rounds", None)
    if settings.steps < steps or settings.decay or rounds or rate_rises:
        rule = "a run can only get longer, after its warm-up, without --decay and --rounds"
        raise BadInput(f"--resume: --steps was {steps}, now {settings.steps}, but {rule}")


def read_own(path, settings):
    """The dict in a file that this run saved with its settings; None if there is no such file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["settings"] == settled(settings) else None
    except Exception:  # missing, or damaged: torch can raise anything
        return None


@contextmanager
def open_log(out, start, need):
    """Yields write(record), which appends to the first `start` lines of metrics.jsonl; process 0
    alone writes. BadInput if another run writes there, or if fewer than `need` bytes are free."""
    if rank():
        yield lambda record: None
        return
    path = out / "metrics.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)
        lock(file, out)
        lines = path.read_bytes().splitlines(keepends=True)
        file.truncate(sum(map(len, lines[:start])))
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None
    if free < need:
        fault = f"{free / 1e9:.2f} GB free, but checkpoints may take {need / 1e9:.2f} GB"
        raise BadInput(f"{out}: {fault}")

    def write(record):
        line = f"{json.dumps(record)}\n".encode()
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[file.write(line) :]
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror}; {last_state(out)}") from None

    with file:
        yield write


def lock(file, out):
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends or closes it
    except BlockingIOError:
        raise BadInput(f"{out}: another run is writing there; give another --out") from None
    except OSError:
        pass  # a file system without locks


_stop = []  # signals that came inside stop_requests


@contextmanager
def stop_requests():
    """Inside, SIGINT and SIGTERM do not end the process: they fill the list that this yields."""
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


def run_tensors(trained, ema, optimizer):
    """All tensors that a training changes, by name. Creates the optimiser's, which AdamW would
    create in its first step."""
    tensors = {f"model.{name}": value.detach() for name, value in trained.items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for name, value in trained.items():
        state = {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[value] = state | {"step": torch.zeros((), device=value.device)}
        tensors |= {f"{key}.{name}": tensor for key, tensor in optimizer.state[value].items()}
    return tensors


@torch.no_grad()
def restore(state, tensors):
    """Moves a checkpoint into a run's tensors; returns its step."""
    step, training = state["step"], state["training"]
    try:
        for name, value in tensors.items():
            value.copy_(shard_like(training[name], value))
    except (KeyError, RuntimeError):
        fault = "does not hold the state of this model's training"
        raise BadInput(f"--resume: the checkpoint {fault}") from None
    state.clear()  # its memory is needed
    return step


def snapshot(model, tensors, unsharded):
    """(model, tensors) to save: the model, with averaged weights if there are any, and a run's
    tensors. All processes call this; under --fsdp process 0 gathers the model in `unsharded`."""
    tensors = {name: gather(value) for name, value in tensors.items()}
    averaged = any(name.startswith("ema.") for name in tensors)
    if rank() == 0 and (averaged or unsharded):
        kind = "ema." if averaged else "model."
        weights = {n.removeprefix(kind): v for n, v in tensors.items() if n.startswith(kind)}
        model = unsharded or copy.deepcopy(model)
        model.load_state_dict(weights, strict=False, assign=True)  # shares their memory
    return model, tensors


def facts(task, step):
    """What a checkpoint says of its model."""
    config = asdict(task.model.config)
    return {"kind": task.kind, "config": config, "vocabulary": task.words, "step": step}


def save_run(settings, task, step, model, tensors, evaluated=False):
    """Process 0 writes a snapshot to last.pt; after the evaluation, --export as well."""
    if rank():
        return
    state = {**facts(task, step), "settings": settled(settings), "evaluated": evaluated}
    state["model"] = task.state_dict(model)
    save_checkpoint(settings.out / "last.pt", state | {"training": tensors})
    if evaluated and settings.export:
        half = {name: value.half() for name, value in state["model"].items()}
        save_checkpoint(settings.export, state | {"model": half, "commit": commit()})


def commit():
    """The commit of the code, with "+" if files differ from it; "" outside a repository."""
    git = ["git", "-C", str(WEIGHTS.parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    with suppress(OSError):  # no git
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""
