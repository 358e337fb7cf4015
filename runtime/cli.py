"""What every command shares: types of flags that say what would be right, faults of the user as one line and status 2,
devices, progress bars, memory that is kept."""

import argparse
import ctypes
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, if it did


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one line that names it and says what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows defaults that say something, and whose errors are BadInput, one line each."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            silent = action.default is None or action.default is False
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=self.Help, **options)
        self._negative_number_matcher = re.compile(r"-[.\d]")  # so that -1,0,1 is a value, as -1 is

    def error(self, message):
        raise BadInput(message)


# ---------------------------------------------------------------------------------------------
# Types of flags: text -> value, or one line that says what would be right


def _checked(kind, text, right, what):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not right(value):
        raise argparse.ArgumentTypeError(f"{text}: must be {what}")
    return value


def positive_int(text):
    return _checked(int, text, lambda n: 1 <= n <= 10**9, f"a whole number from 1 to {10**9}")


def whole(text):
    return _checked(int, text, lambda n: 0 <= n <= 10**9, f"a whole number from 0 to {10**9}")


def seed(text):
    return _checked(int, text, lambda n: 0 <= n < 2**31, f"a whole number from 0 to {2**31 - 1}")


def frame_size(text):
    """ "32x56" -> (32, 56), height and width; "32" -> (32, 32)."""
    right = "height x width in pixels, for example 32x56, or one number for both"

    def numbers(text):
        sides = [int(side) for side in text.split("x")]
        return tuple(sides * 2 if len(sides) == 1 else sides)

    return _checked(numbers, text, lambda x: x == x and len(x) == 2 and min(x) > 0, right)


def clip_count(text):
    return _checked(int, text, lambda n: 1 <= n <= 4096, "a whole number from 1 to 4096")


def positive(text):
    return _checked(float, text, lambda x: 0 < x < math.inf, "a positive number")


def non_negative(text):
    return _checked(float, text, lambda x: 0 <= x < math.inf, "0 or a positive number")


def finite(text):
    return _checked(float, text, math.isfinite, "a finite number")


def fraction(text):
    return _checked(float, text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _floats(text):
    return tuple(float(part) for part in text.split(","))


def triple(text):
    """ "1,1,0.5" -> (1.0, 1.0, 0.5): weights of VQ, MQ and TA."""
    right = "three numbers with commas between, for example 1,1,0.5"
    return _checked(
        _floats, text, lambda x: x == x and len(x) == 3 and all(map(math.isfinite, x)), right
    )


def interval(text):
    """ "0,0.9" -> (0.0, 0.9): the lowest and the highest t."""
    right = "two numbers from 0 to 1 with a comma between, the lower first, for example 0,0.9"
    return _checked(
        _floats, text, lambda x: x == x and len(x) == 2 and 0 <= x[0] <= x[1] <= 1, right
    )


# ---------------------------------------------------------------------------------------------
# Running


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
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.zeros(1, device=name).cpu()  # meta has no numbers to copy
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"--device {name}: not available here ({str(error).splitlines()[0]})"
        ) from None
    return torch.device(name)


def has_bf16(device):
    """Whether a device multiplies bfloat16 matrices in hardware. A CPU that does not is 30 times as fast in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_writable(folder, flag):
    """Makes a folder and sees that files can be written there. BadInput, which names the flag, if not."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{flag}: cannot write to {folder}: {error.strerror}") from None
