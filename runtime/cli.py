"""What all commands share: one-line errors, devices and progress bars."""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

FIRST = os.environ.get("RANK", "0") == "0"  # process 0 of torchrun's, or the only one


class BadInput(ValueError):
    """The user's input is wrong. The message, one line, says what is wrong and what is right."""


def run(main):
    """Runs a command: bad input ends it with one line and exit status 2, Ctrl-C with 130."""
    try:
        main()
    except BadInput as error:
        time.sleep(0 if FIRST else 5)  # torchrun may end the process before it repeats the line
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def progress_bar(name, unit):
    """A tqdm for a list or for an iterator of `total` items: progress(items, total)."""
    options = {"unit": unit, "leave": False, "dynamic_ncols": True, "disable": not FIRST}
    return lambda items, total=None: tqdm(items, name, total, **options)


def pick_device(name="auto"):
    """torch.device of a name; "auto" is the accelerator or the CPU. BadInput if unavailable."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # meta has no numbers to copy
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fault = str(error).splitlines()[0]
        raise BadInput(f"--device {name}: not available here ({fault})") from None
    return torch.device(name)


def check_writable(folder, flag):
    """Creates a folder. BadInput, which names the flag, if no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"{flag}: cannot write to {folder}: {error.strerror}") from None
