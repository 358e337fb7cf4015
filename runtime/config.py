"""Settings as dataclasses, and command lines made from them.

    @dataclass
    class Dpo(Alignment):
        beta: float = flag(100.0, "weight of the KL term", positive)

A field is a flag: `refresh_pairs` is --refresh-pairs. A class that inherits a flag may give it
another default.
"""

import argparse
from dataclasses import field
from pathlib import Path

from runtime.cli import BadInput, Parser


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
