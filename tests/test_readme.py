"""What the README files name is there: commands, which also run, flags, functions, files, links."""

import importlib
import re
import shlex
import sys
from contextlib import suppress
from itertools import product
from unittest import mock

import common
import pytest
from readme import ROOT, all_commands, commands, fenced, prose, sections, spans, tables
from torch.distributed import run as torchrun

import train

DOCS = ("README.md", "weights/README.md", "examples/README.md")

# Each command in a fence of README.md is run: here, with these flags behind its own, the last of a kind counting,
SHRUNK = {
    "train.py": "--steps 2 --batch 2 --pairs 8 --eval-prompts 2 --eval-pairs 10 --device cpu",
    "sample.py": "--steps 2 --n 2 --device cpu",
    "data.py": "--pairs 10",
    "examples/toy_latents.py": "--pairs 8",
}
ELSEWHERE = {  # or by these tests
    "torchrun .*train.py": [
        "tests/test_distributed.py::test_torchrun_from_a_shell",
        "tests/test_distributed.py::test_every_way_takes_the_same_steps",
    ],
    "python evaluate.py report": ["tests/test_report.py::test_the_page_is_whole_and_needs_nothing_else"],
}

MADE = r"(?!out/|last\.pt|results/report\.html)"  # by commands
FILE = re.compile(MADE + r"(?:[\w./-]+\.(?:py|pt)|(?:tests|results|weights|examples)/[\w./-]*)(?:::\w+)?")
NAME = re.compile(r"(\w+)\.(?!(?:csv|gif|html|jsonl?|md|png)$)(\w+)(?:\(.*\))?")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_commands_are_found_in_shell_text():
    text = """$ OMP_NUM_THREADS=1 python a.py --x "b c" \\
        --y=1   # why
said
    pip install python
for s in 3 4; do
    python b.py --seed $s && torchrun c.py ${s}.pt; done
"""
    a, b, c = ["python", "a.py", "--x", "b c", "--y=1"], ["python", "b.py", "--seed", "3"], ["torchrun", "c.py", "3.pt"]
    assert commands(text) == [(a, ["said"]), (b, []), (c, [])]


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def parser_of(module):
    """The parser that a script's main fills."""
    with mock.patch.object(common.Parser, "parse_args", autospec=True, side_effect=InterruptedError) as parse:
        with pytest.raises(InterruptedError):
            module.main()
    return parse.call_args.args[0]


@pytest.mark.parametrize(("doc", "command"), [(doc, command) for doc in DOCS for command in all_commands(doc)])
def test_a_command_is_accepted(doc, command):
    _, script, *flags = shlex.split(command)
    if command.startswith("torchrun"):
        args = torchrun.parse_args([script, *flags] + ["train.py"] * (".py" not in command))
        script, flags = args.training_script, args.training_script_args
    if script == "-m":
        assert flags[0] == "pytest" and all(is_there(flag) for flag in flags if "/" in flag)
        return
    assert is_there(script)
    if script == "examples/wan.py":
        pytest.importorskip("diffusers")
    module = module_of(script)
    flags = ["1" if re.fullmatch(r"[A-Z]+|<.*>", flag) else flag for flag in flags if flag != "..."]  # N, DIR
    with suppress(SystemExit):  # of --help; a bad flag is BadInput
        if flags:
            (train.arguments if module is train else parser_of(module).parse_args)(flags)


def elsewhere(words):
    return [test for start, tests in ELSEWHERE.items() for test in tests if re.match(start, " ".join(words))]


def here(words):
    return words[1] in SHRUNK and not elsewhere(words)


def test_each_command_in_a_fence_is_run_by_a_test():
    for words, _ in sum(fenced("README.md").values(), []):
        known = here(words) or elsewhere(words) or words[1:3] == ["-m", "pytest"]
        assert known, f"no test runs {shlex.join(words)}: SHRUNK, ELSEWHERE"
        assert all(map(is_there, elsewhere(words)))


@pytest.mark.parametrize("heading", [h for h, part in fenced("README.md").items() if any(here(w) for w, _ in part)])
def test_the_commands_of_a_section_run_one_after_the_other(heading, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, output in fenced("README.md")[heading]:
        if not here(words):
            continue
        planned = "--plan" in words  # takes no time, and always says the same
        monkeypatch.setattr(sys, "argv", words[1:] + SHRUNK[words[1]].split() * (not planned))
        module_of(words[1]).main()
        said = capsys.readouterr().out.splitlines()
        assert said == output if planned else said


# ---------------------------------------------------------------------------------------------------------------------
# Names


def is_there(name, folder=ROOT):
    """Whether `name` is a file in the folder or the root; of path::test, whether the file has that test."""
    path, _, test = name.partition("::")
    file = next((base / path for base in (folder, ROOT) if (base / path).exists()), None)
    return file is not None and (not test or f"def {test}(" in file.read_text())


def resolved(span, folder=ROOT):
    """Whether the file or module.name in a span is there; None if it names neither."""
    if FILE.fullmatch(span):
        return is_there(span, folder)
    match = NAME.fullmatch(span)
    if match and (ROOT / f"{match[1]}.py").exists():
        return hasattr(importlib.import_module(match[1]), match[2])


@pytest.mark.parametrize("doc", DOCS)
def test_names_and_files_are_there(doc):
    named = {span: resolved(span, (ROOT / doc).parent) for span in spans(prose(doc))}
    assert True in named.values()
    assert [span for span, there in named.items() if there is False] == []


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", prose(doc)):
        file = (ROOT / doc).parent / path if path else ROOT / doc
        assert file.exists(), path
        headings = sections(prose(file)) if anchor else []
        anchors = ["", *(re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings)]
        assert anchor in anchors


def test_flags_are_those_of_a_parser():
    scripts = map(importlib.import_module, ("train", "sample", "data", "evaluate", "bench"))
    parsers = [torchrun.get_args_parser(), *map(parser_of, scripts)]
    text = [span for doc in DOCS[:2] for span in spans(prose(doc)) if not span.startswith("pip")]
    flags = set(re.findall(r"(?<![\w-])--\w[\w-]*", " ".join(text)))
    assert flags and flags - {flag for parser in parsers for flag in parser._option_string_actions} == set()


def test_the_table_of_files_has_every_module():
    listed = [row[0] for rows in tables(prose("README.md")) if rows[0][0] == "file" for row in rows]
    assert {path.name for path in ROOT.glob("*.py")} - set(spans(" ".join(listed))) == set()


def test_the_map_has_every_equation_and_table_of_the_paper():
    text = sections(prose("README.md")).get("The paper, line by line")
    if text is None:
        pytest.skip("README.md has no map of the paper")
    (_, *rows), found = next(tables(text)), set()
    for row in rows:
        assert any(map(resolved, spans(row[-1]))) or "not here" in " ".join(row), row
        for kind, numbers in re.findall(r"(Eq|Table)s?\.? (\d+(?:(?:[-–]|, | and )\d+(?!\d|\.\d))*)", row[0]):
            for low, high in re.findall(r"(\d+)(?:[-–](\d+))?", numbers):
                found |= set(product([kind], range(int(low), int(high or low) + 1)))
    assert set(product(("Eq", "Table"), range(1, 12))) - found == set()
