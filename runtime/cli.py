"""What all commands share: types of flags, one-line errors, devices and progress bars."""

import argparse
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

FIRST = os.environ.get("RANK", "0") == "0"  # process 0 of torchrun's, or the only one


class BadInput(ValueError):
    """The user's input is wrong. The message, one line, says what is wrong and what is right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, and whose help shows defaults."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            is_silent = action.default is None or action.default is False
            return action.help if is_silent else super()._get_help_string(action)

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=self.Help, **options)
        self._negative_number_matcher = re.compile(r"-[.\d]")  # -1,0,1 is a value, as -1 is

    def error(self, message):
        raise BadInput(message)


def flag_type(parse, is_valid, description):
    """A type for add_argument: parse(text), or an error that says what the value must be."""

    def convert(text):
        try:
            value = parse(text)
            if is_valid(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: must be {description}")

    return convert


def whole_number(low, high):
    return flag_type(int, lambda n: low <= n <= high, f"a whole number from {low} to {high}")


def numbers(text):
    return tuple(float(part) for part in text.split(","))


def sides(text):
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def is_triple(values):
    return len(values) == 3 and all(map(math.isfinite, values))


def is_interval(values):
    return len(values) == 2 and 0 <= values[0] <= values[1] <= 1


positive_int = whole_number(1, 10**9)
whole = whole_number(0, 10**9)
seed = whole_number(0, 2**31 - 1)
clip_count = whole_number(1, 4096)
positive = flag_type(float, lambda x: 0 < x < math.inf, "a positive number")
non_negative = flag_type(float, lambda x: 0 <= x < math.inf, "0 or a positive number")
finite = flag_type(float, math.isfinite, "a finite number")
fraction = flag_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
triple = flag_type(numbers, is_triple, "three numbers, as in 1,1,0.5")
interval = flag_type(numbers, is_interval, "from 0 to 1, as in 0,0.9")
frame_size = flag_type(sides, lambda x: min(x) > 0, "height x width, as in 32x56")


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
