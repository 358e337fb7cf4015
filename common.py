"""What every command shares: how it fails, which device it runs on, and the file format of checkpoints.

A checkpoint is one torch file, a dict of plain values and tensors that loads with `weights_only=True`:

    format   1
    kind     "velocity" (a VideoTransformer), "reward" (a VideoReward) or "noisy reward" (a NoisyReward)
    config   the model's config as a dict          vocabulary   list of words, in the order of their ids
    model    state dict, any float dtype           step         training steps done
    and while training: ema, optimizer, settings (the flags), trained and averaged (the adapters, under LoRA)
"""

import argparse
import ctypes
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

FORMAT = 1
WEIGHTS = Path(__file__).parent / "weights"
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, if it did


class BadInput(Exception):
    """Something the user gave is wrong. The message is one line that names it and says what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows defaults that say something, and whose errors are BadInput, one line each."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            silent = action.default is None or action.default is False
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, description):
        super().__init__(description=description, formatter_class=self.Help)
        self._negative_number_matcher = re.compile(r"-[.\d]")  # so that -1,0,1 is a value, as -1 is

    def error(self, message):
        raise BadInput(message)


def numbers(flag, text, example):
    """ "1,1,0.5" -> (1.0, 1.0, 0.5): as many numbers as `example` has. BadInput, which names the flag, for all else."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    count = len(example.split(","))
    if len(values) != count or not all(map(math.isfinite, values)):
        raise BadInput(f"{flag} {text}: {count} numbers with commas between are needed, for example {example}")
    return values


def keep_freed_memory():
    """Lets glibc keep large freed blocks. It gives them back by default, and each new tensor of some MB then pays for
    fresh pages: labelling 640 pairs takes 1.2 s so and 2.2 s otherwise. Where there is no glibc, nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def run(main):
    """Runs a command: bad input ends it with one line and exit status 2, Ctrl-C with 130.

    Of many processes all meet the same fault, or one does; torchrun ends the others once one has ended. So process 0
    speaks at once, and the others if they are still there a while later."""
    keep_freed_memory()
    try:
        main()
    except BadInput as error:
        time.sleep(0 if FIRST else 5)
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def progress_bar(name, unit):
    """A tqdm for a list or an iterator of `total` items, for functions that take a progress argument."""
    return lambda items, total=None: tqdm(
        items, name, total, unit=unit, leave=False, dynamic_ncols=True, disable=not FIRST
    )


def pick_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a named one; BadInput if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def has_bf16(device):
    """Whether a device multiplies bfloat16 matrices in hardware. A CPU that does not is 30 times as fast in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def clock(device):
    """Seconds: of this process on a CPU, of the wall once the device is idle."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def medians(ways, device, rounds=21, ordered=False):
    """{name: median seconds} of {name: function}, which take turns; one round before does not count. Medians are taken
    of shares of a round's time, so that a round in which the machine was slow leaves their ratios alone. Every round
    has another order unless `ordered`: what ran before decides where tensors lie in memory, which is worth 4 %."""
    seconds = []
    for i in range(rounds + 1):
        took = {}
        for name in ways if ordered else random.Random(i).sample(list(ways), len(ways)):
            begun = clock(device)
            ways[name]()
            took[name] = clock(device) - begun
        if i:
            seconds.append(took)
    totals = [sum(took.values()) for took in seconds]
    shares = {name: [took[name] / total for took, total in zip(seconds, totals)] for name in ways}
    return {name: statistics.median(share) * statistics.median(totals) for name, share in shares.items()}


def fsync_folder(path):
    """Puts the names in a folder on the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save_checkpoint(path, state):
    """Writes `state` so that `path` is at every moment either the old file or the whole new one. BadInput if it cannot
    be written; the old file stays."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a write that failed
        with suppress(OSError):
            temporary.unlink()
        fault = getattr(error, "strerror", None) or "the disk is full, or a limit on the size of files was met"
        raise BadInput(f"cannot write {path}: {fault}") from None


def load_checkpoint(path, kind=None):
    """Reads a checkpoint as a dict. BadInput for a missing, unreadable or foreign file, or one of another kind."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(
            f"{path}: no such checkpoint; train one with `python train.py`, or leave the flag out to use weights/"
        )
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):  # of odd pickles, refused below
            if file.read(4) != b"PK\3\4":  # what torch wrote before it wrote zip files; its lengths are not checked
                raise ValueError
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make torch raise anything, and nothing else happens here
        raise BadInput(
            f"{path}: not a checkpoint that can be read safely (damaged, or not written by train.py)"
        ) from None
    if not isinstance(state, dict) or not {"format", "kind", "config", "model", "vocabulary"} <= state.keys():
        raise BadInput(f"{path}: not a checkpoint of this project (it lacks format, kind, config, model or vocabulary)")
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise BadInput(f"{path}: checkpoint format {state['format']}, but this version reads format {FORMAT}")
    if not isinstance(state["vocabulary"], list) or not all(isinstance(word, str) for word in state["vocabulary"]):
        raise BadInput(f"{path}: its vocabulary is not a list of words")
    if kind and state["kind"] != kind:
        raise BadInput(f"{path}: holds a {state['kind']} model, but a {kind} model is needed here")
    return state


def check_fit(model, weights, path):
    """BadInput that names the first tensor of a state dict that does not fit `model`, which may be a meta one."""
    own = model.state_dict()
    for name in [*own, *weights]:
        value = weights.get(name)
        if name not in weights or name not in own:
            where = "lacks" if name not in weights else "has an unknown"
            raise BadInput(f"{path}: {where} tensor {name!r}; it belongs to another kind or version of model")
        if not torch.is_tensor(value) or not value.is_floating_point() or value.layout != torch.strided:
            raise BadInput(f"{path}: {name!r} is no tensor of floating-point numbers")
        if own[name].shape != value.shape or value.untyped_storage().nbytes() < value.nbytes:
            shapes = f"{tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
            raise BadInput(f"{path}: tensor {name!r} has another shape: {shapes}")


def check_writable(folder, flag):
    """Makes a folder and sees that files can be written there. BadInput, which names the flag, if not."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{flag}: cannot write to {folder}: {error.strerror}") from None
