"""What the Markdown files name is there: commands, which also run, flags, functions, files, links."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
from forked import with_read
from readme import (
    DOCS,
    ROOT,
    WINGS,
    all_commands,
    commands,
    fenced,
    modules,
    prose,
    sections,
    spans,
)
from torch.distributed import run as torchrun

from model import PRESETS
from runtime.cli import Parser
from runtime.config import flags_of, option
from settings import ALGORITHMS, settings_of

RUN = [doc for doc in DOCS if doc == "README.md" or doc.startswith("docs/")]  # whose fences are run

# Each command in a fence of these is run: here, with these flags behind its own, the last of a kind counting, under
# torchrun by two processes and with presets that are narrow and shallow,
SHRUNK = {
    "train.py": "--steps=2 --batch=2 --pairs=8 --eval-prompts=2 --eval-pairs=10 --device=cpu",
    "sample.py": "--steps 2 --n 2 --device cpu",
    "data.py": "--pairs 25",
    "examples/toy_latents.py": "--pairs 60 --size 32",
}
ELSEWHERE = {  # or by these tests
    "python train.py .*(--rounds|nft|grpo)": [
        "tests/test_online.py::test_killed_in_a_round_and_between_two_a_run_ends_at_the_same_bits"
    ],
    "python -m pages.label .*--(report|merge)": [
        "tests/test_label.py::test_several_people_become_one_and_a_reviewer_decides"
    ],
    "python -m pages.label ": ["tests/test_label.py::test_thirty_pairs_and_a_kill_in_the_middle"],
    "python -m real_data.prepare": ["tests/test_videos.py::test_videos_as_they_come"],
    "python evaluate.py report": [
        "tests/test_report.py::test_the_page_is_whole_and_needs_nothing_else"
    ],
}

MADE = r"(?!out/|last\.pt|round\.pt|results/report\.html)"  # by commands
FOLDERS = "|".join(("tests", "results", "weights", "docs", *WINGS))
FILE = re.compile(MADE + rf"(?:[\w./-]+\.(?:py|pt)|(?:{FOLDERS})/[\w./-]*)(?:::\w+)?")
NAME = re.compile(
    r"(\w+(?:\.\w+)*)\.(?!(?:csv|gif|html|jsonl?|md|mp4|npy|npz|png|svg)$)(\w+)(?:\(.*\))?"
)


# ---------------------------------------------------------------------------------------------
# Commands


def test_commands_are_found_in_shell_text():
    text = """$ OMP_NUM_THREADS=1 python a.py --x "b c" \\
        --y=1   # why
said
    pip install python
for s in 3 4; do
    python b.py --seed $s && torchrun c.py ${s}.pt; done
"""
    a, b, c = (
        ["python", "a.py", "--x", "b c", "--y=1"],
        ["python", "b.py", "--seed", "3"],
        ["torchrun", "c.py", "3.pt"],
    )
    assert commands(text) == [(a, ["said"]), (b, []), (c, [])]


class Accepted(Exception):
    """Raised when a command has read its flags, in place of its work."""


def parser_of(script, *flags):
    """The parser of a script, which has accepted the flags. SystemExit of one that it refuses, or after --help."""
    parse = Parser.parse_args

    def stop(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Accepted(parser)

    with (
        mock.patch.object(Parser, "parse_args", stop),
        mock.patch.object(sys, "argv", [script, *flags]),
    ):
        with pytest.raises(Accepted) as accepted:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return accepted.value.args[0]


@pytest.mark.parametrize(
    ("doc", "command"), [(doc, command) for doc in DOCS for command in all_commands(doc)]
)
def test_a_command_is_accepted(doc, command, capsys):
    _, script, *flags = shlex.split(command)
    if command.startswith("torchrun"):
        args = torchrun.parse_args([script, *flags] + ["train.py"] * (".py" not in command))
        script, flags = args.training_script, args.training_script_args
    if script == "-m" and flags[0] != "pytest":
        script = flags.pop(0).replace(".", "/") + ".py"
    if script == "-m":
        assert all(is_there(flag) for flag in flags if "/" in flag)
        return
    assert is_there(script)
    flags = [
        "1" if re.fullmatch(r"[A-Z]+|<.*>", flag) else flag for flag in flags if flag != "..."
    ]  # N, DIR
    if not flags:  # the name of a script
        return
    if script == "train.py":
        settings_of(flags)  # which looks further than its parser
    elif script == "examples/wan.py":
        pytest.importorskip("diffusers")
        importlib.import_module("examples.wan").settings_of(flags)
    elif "--help" not in flags:
        parser_of(script, *flags)


def elsewhere(words):
    return [
        test
        for start, tests in ELSEWHERE.items()
        for test in tests
        if re.match(start, " ".join(words))
    ]


def here(words):
    return (words[0] == "torchrun" or words[1] in SHRUNK) and not elsewhere(words)


def shrunk_flags(script, flags):
    """What stands behind the flags of a script, so that it takes little time."""
    shrunk = SHRUNK[script].split()
    if script != "train.py":
        return shrunk
    read = with_read(flags, *shrunk)
    return read[: len(read) - len(flags)]


def run_by_two_processes(words):
    """The documented torchrun command: its own flags, two processes, tests/narrow.py for train.py."""
    script = words.index("train.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", *words[1:script]]
    launcher += ["--standalone", "--nproc_per_node", "2", str(ROOT / "tests" / "narrow.py")]
    shrunk = shrunk_flags("train.py", words[script + 1 :])
    shrunk += ["--batch", "16"]  # at least one clip for each of 2 x --accum
    done = subprocess.run(
        [*launcher, *words[script + 1 :], *shrunk], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes on cpu") == done.stdout.count("last.pt") == 1


@pytest.mark.parametrize("doc", RUN)
def test_each_command_in_a_fence_is_run_by_a_test(doc):
    for words, _ in sum(fenced(doc).values(), []):
        known = here(words) or elsewhere(words) or words[1:3] == ["-m", "pytest"]
        assert known, f"no test runs {shlex.join(words)}: SHRUNK, ELSEWHERE"
        assert all(map(is_there, elsewhere(words)))


SECTIONS = [
    (doc, h)
    for doc in RUN
    for h, part in fenced(doc).items()
    if any(here(words) for words, _ in part)
]


@pytest.mark.parametrize(("doc", "heading"), SECTIONS)
def test_the_commands_of_a_section_run_one_after_the_other(
    doc, heading, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for words, output in fenced(doc)[heading]:
        if not here(words):
            continue
        if words[0] == "torchrun":
            run_by_two_processes(words)
            continue
        planned = "--plan" in words  # takes no time, and always says the same
        flags = words[2:]
        if "--preset" in flags and not planned:  # of the same clips and patches, narrow and shallow
            for name, config in PRESETS.items():
                monkeypatch.setitem(PRESETS, name, replace(config, dim=48, depth=3, heads=2))
        shrunk = [] if planned else shrunk_flags(words[1], flags)
        monkeypatch.setattr(sys, "argv", [words[1], *flags, *shrunk])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        said = capsys.readouterr().out.splitlines()
        assert said == output if planned else said


# ---------------------------------------------------------------------------------------------
# Names


def is_there(name, folder=ROOT):
    """Whether `name` is a file in the folder or the root; of path::test, whether the file has that test."""
    path, _, test = name.partition("::")
    file = next((base / path for base in (folder, ROOT) if (base / path).exists()), None)
    return file is not None and (not test or f"def {test}(" in file.read_text())


def resolved(span, folder=ROOT):
    """Whether the file or module.name in a span is there; None if it names neither. A module is named as it is
    imported, `runtime.checkpoint.restore`, or without its folders, `checkpoint.restore`."""
    if FILE.fullmatch(span):
        return is_there(span, folder)
    if not (match := NAME.fullmatch(span)):
        return None
    *path, last = match[1].split(".")
    known = modules()
    found = [name for name in known if name == match[1]] or [
        name for name in known if name.split(".")[-1] == match[1]
    ]
    if len(found) == 1:
        return hasattr(importlib.import_module(found[0]), match[2])
    if f"{match[1]}.{match[2]}" in known:
        return True
    return False if found or path and path[0] in WINGS else None


def test_names_in_folders_are_resolved():
    assert (
        resolved("flow.interpolate") and resolved("runtime.cli.Parser") and resolved("cli.Parser")
    )
    assert resolved("studies.align") and resolved("studies/align.py") and resolved("real_data/")
    gone = (
        "flow.away",
        "runtime.cli.away",
        "cli.away",
        "runtime.away.Parser",
        "studies/away.py",
        "docs/away.md",
    )
    assert [resolved(name) for name in gone] == [False] * len(gone)
    assert resolved("torch.randn") is None and resolved("pairs.csv") is None


@pytest.mark.parametrize("doc", DOCS)
def test_names_and_files_are_there(doc):
    named = {span: resolved(span, (ROOT / doc).parent) for span in spans(prose(doc))}
    assert named
    assert [span for span, there in named.items() if there is False] == []


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", prose(doc)):
        file = (ROOT / doc).parent / path if path else ROOT / doc
        assert file.exists(), path
        if re.fullmatch(
            r"L\d+(-L\d+)?", anchor
        ):  # a line of code: `evaluate.py tables --check` looks at it
            continue
        headings = sections(prose(file)) if anchor else []
        anchors = [
            "",
            *(re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings),
        ]
        assert anchor in anchors


def test_flags_are_those_of_a_parser():
    commands = (
        ["sample.py"],
        ["data.py", "table"],
        *(["evaluate.py", name] for name in ("align", "bench", "report")),
    )
    parsers = [torchrun.get_args_parser(), *(parser_of(*words) for words in commands)]
    docs = [doc for doc in DOCS if not doc.startswith("examples/")]  # wan.py has flags of its own
    text = [span for doc in docs for span in spans(prose(doc)) if not span.startswith("pip")]
    flags = set(re.findall(r"(?<![\w-])--\w[\w-]*", " ".join(text)))
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    for algorithm in ALGORITHMS.values():
        known.update(map(option, flags_of(algorithm)))
    assert flags and flags - known == set()
