"""Settings as dataclasses, and command lines made from them.

    @dataclass
    class Dpo(Alignment):
        beta: float = flag(100.0, "weight of the KL term", positive)

A field is a flag: `refresh_pairs` is --refresh-pairs. A class that inherits a flag may give it
another default.
"""

import argparse
from dataclasses import field, fields
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


def declaring_class(cls, name):
    """The class that declared a flag, not one that changed its default."""
    return [base for base in cls.__mro__ if name in vars(base).get("__dataclass_fields__", {})][-1]


def flags_of(cls):
    """{field: the metadata of `flag`} for every flag of a settings class."""
    found = {}
    for each in fields(cls):
        declared = declaring_class(cls, each.name).__dataclass_fields__[each.name]
        if declared.metadata:
            found[each.name] = declared.metadata
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
    for name in flags:
        title = declaring_class(cls, name).__doc__.split("\n")[0]
        groups.setdefault(title, []).append(name)
    for title, names in reversed(groups.items()):  # the algorithm's own flags come first
        group = parser.add_argument_group(title)
        for name in names:
            add_flag(group, name, flags[name], getattr(cls, name))
    given, unknown = parser.parse_known_args(argv)
    settings = cls(**vars(given))
    for name in vars(given):
        missing = [other for other in flags[name]["needs"] if not getattr(settings, other, None)]
        surplus = [other for other in flags[name]["without"] if getattr(settings, other, None)]
        if missing:
            raise BadInput(f"{option(name)}: has no effect without {option(missing[0])}")
        if surplus:
            raise BadInput(f"{option(name)}: has no effect with {option(surplus[0])}")
    return settings, [text.split("=")[0] for text in unknown]
