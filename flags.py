"""Command lines: types of flags, and parsers made from dataclasses.

    @dataclass
    class Dpo(Alignment):
        beta: float = flag(100.0, "weight of the KL term", positive)

A field is a flag: `refresh_pairs` is --refresh-pairs. A class that inherits a flag may give it
another default.
"""

import argparse
import math
import re
from dataclasses import field
from pathlib import Path

from runtime.cli import BadInput


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


def flag(default, help, kind=str, choices=None, needs=(), without=(), resumable=False, file=False):
    """A field that is a flag of the command line.

    kind: text -> value. needs, without: names of the flags with and without which it is read.
    resumable: whether a resumed run may change it. file: whether it names a file that is read."""
    about = {"help": help, "kind": kind, "choices": choices, "needs": needs, "without": without}
    return field(default=default, metadata=about | {"resumable": resumable, "file": file})


def option(name):
    return "--" + name.replace("_", "-")


def flags_of(cls):
    """{field: the arguments of `flag`, and "group": the class that declares it} of settings."""
    found = {}
    for base in reversed(cls.__mro__):
        for name, value in getattr(base, "__dataclass_fields__", {}).items():
            if value.metadata and name not in found:  # else it has another default here
                found[name] = value.metadata | {"group": base}
    return found


def add_flag(group, name, about, default):
    text = about["help"]
    if default is False:
        how = {"action": "store_true"}
    else:
        how = {"type": about["kind"], "choices": about["choices"]}
        if isinstance(default, tuple):
            default = ",".join(f"{value:g}" for value in default)
        if isinstance(default, Path) and default.is_absolute():  # in weights/
            default = f"{default.parent.name}/{default.name}"
        if default is not None:
            text += f" (default: {default})"
    group.add_argument(option(name), help=text, default=argparse.SUPPRESS, **how)


def parse(cls, argv=None):
    """(settings, options that are not theirs) of a command line, by default sys.argv's. BadInput
    for a value that is wrong, and for a flag that has no effect beside the others."""
    parser = Parser(cls.__doc__, usage="%(prog)s [flags]", allow_abbrev=False)
    flags, groups = flags_of(cls), {}
    for name, about in flags.items():
        groups.setdefault(about["group"], []).append(name)
    for base, names in reversed(groups.items()):  # the algorithm's own flags come first
        group = parser.add_argument_group(base.__doc__.split("\n")[0])
        for name in names:
            add_flag(group, name, flags[name], getattr(cls, name))
    given, unknown = parser.parse_known_args(argv)
    settings = cls(**vars(given))
    for name in vars(given):
        for other in flags[name]["needs"]:
            if not getattr(settings, other, None):
                raise BadInput(f"{option(name)}: has no effect without {option(other)}")
        for other in flags[name]["without"]:
            if getattr(settings, other, None):
                raise BadInput(f"{option(name)}: has no effect with {option(other)}")
    return settings, [text.split("=")[0] for text in unknown]
