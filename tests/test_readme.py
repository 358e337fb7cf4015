"""Commands in the Markdown files run, and their links lead somewhere."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from forked import with_read
from readme import DOCS, ROOT, all_commands, fenced, prose, sections
from torch.distributed import run as torchrun

from flags import Parser
from model import PRESETS
from settings import settings_of

# Each command in a fence of these is run, with these flags behind its own (the last of a kind
# counts); torchrun by two processes, and presets narrow and shallow (narrow.py),
RUN = [doc for doc in DOCS if doc == "README.md" or doc.startswith("docs/")]
SHRUNK = {
    "train.py": "--steps=2 --batch=2 --pairs=8 --eval-prompts=2 --eval-pairs=10 --device=cpu",
    "sample.py": "--steps 2 --n 2 --device cpu",
    "data.py": "--pairs 12",
    "examples/toy_latents.py": "--pairs 24 --size 32",
}
ELSEWHERE = {  # or by another test
    "python train.py .*(--rounds|nft|grpo)": "test_online.py",
    "python -m pages.label": "test_label.py",
    "python train.py .*(labels-1/pairs.csv|out/loop/reward)": "test_label.py",
    "python -m real_data.prepare": "test_videos.py",
    "python evaluate.py report": "test_report.py",
    "python -m pytest": "CI",
}


class Accepted(Exception):
    """Raised when a command has read its flags, in place of its work."""


@pytest.mark.parametrize("doc", DOCS)
def test_commands_are_accepted(doc, monkeypatch):
    parse = Parser.parse_known_args

    def stop(parser, argv=None, namespace=None):
        _, unknown = parse(parser, argv, namespace)
        assert not unknown, unknown
        raise Accepted

    for command in all_commands(doc):
        _, script, *flags = shlex.split(command)
        if command.startswith("torchrun"):
            args = torchrun.parse_args([script, *flags] + ["train.py"] * (".py" not in command))
            script, flags = args.training_script, args.training_script_args
        if script == "-m" and flags[0] != "pytest":
            script = flags.pop(0).replace(".", "/") + ".py"
        flags = ["1" if re.fullmatch(r"[A-Z]+|<.*>", flag) else flag for flag in flags]  # N, DIR
        assert script == "-m" or (ROOT / script).exists(), command
        if script == "-m" or not flags or "..." in flags or "--help" in flags:
            continue
        if script == "train.py":
            settings_of(flags)
        elif script == "examples/wan.py":
            pytest.importorskip("diffusers")
            importlib.import_module("examples.wan").settings_of(flags)
        else:
            monkeypatch.setattr(sys, "argv", [script, *flags])
            with monkeypatch.context() as patch, pytest.raises(Accepted):
                patch.setattr(Parser, "parse_known_args", stop)
                runpy.run_path(str(ROOT / script), run_name="__main__")


def run_elsewhere(words):
    return any(re.match(start, shlex.join(words)) for start in ELSEWHERE)


def shrunk_flags(script, flags):
    """What stands behind the flags of a script, so that it takes little time."""
    shrunk = SHRUNK[script].split()
    if script != "train.py":
        return shrunk
    read = with_read(flags, *shrunk)
    return read[: len(read) - len(flags)]


def run_by_two_processes(words):
    """A documented torchrun command: its own flags, two processes, narrow presets."""
    script = words.index("train.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", *words[1:script]]
    launcher += ["--standalone", "--nproc_per_node", "2", str(ROOT / "tests" / "narrow.py")]
    flags = words[script + 1 :]
    flags += [*shrunk_flags("train.py", flags), "--batch", "16"]  # one clip for each of 2 x --accum
    done = subprocess.run([*launcher, *flags], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes on cpu") == done.stdout.count("last.pt") == 1


SECTIONS = [
    (doc, heading)
    for doc in RUN
    for heading, part in fenced(doc).items()
    if not all(run_elsewhere(words) for words, _ in part)
]


@pytest.mark.parametrize(("doc", "heading"), SECTIONS)
def test_the_commands_of_a_section_run_one_after_the_other(
    doc, heading, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for words, _ in fenced(doc)[heading]:
        if run_elsewhere(words):
            continue
        if words[0] == "torchrun":
            run_by_two_processes(words)
            continue
        script, *flags = words[1:]
        if "--preset" in flags:
            for name, config in PRESETS.items():
                monkeypatch.setitem(PRESETS, name, replace(config, dim=48, depth=3, heads=2))
        monkeypatch.setattr(sys, "argv", [script, *flags, *shrunk_flags(script, flags)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", prose(doc)):
        file = (ROOT / doc).parent / path if path else ROOT / doc
        assert file.exists(), path
        if anchor and not re.fullmatch(r"L\d+(-L\d+)?", anchor):  # lines: evaluate.py tables
            headings = [
                re.sub(r"[^\w -]", "", heading).lower() for heading in sections(prose(file))
            ]
            assert anchor in [heading.replace(" ", "-") for heading in headings]
