"""Commands in the Markdown files run, and their links lead somewhere."""

import importlib
import re
import runpy
import shlex
import sys
from dataclasses import replace

import pytest
from forked import command, together, with_read
from readme import DOCS, ROOT, all_commands, fenced, prose, sections

from flags import Parser
from model import PRESETS
from settings import settings_of

# Each command in a fence of these is run, with these flags behind its own (the last of a kind
# counts); presets are narrow and shallow.
RUN = [doc for doc in DOCS if doc == "README.md" or doc.startswith("docs/")]
SHRUNK = {
    "train.py": "--steps=2 --batch=2 --pairs=8 --eval-prompts=2 --eval-pairs=10 --device=cpu",
    "sample.py": "--steps 2 --n 2 --device cpu",
    "real_data/export_toy.py": "--pairs 12",
    "examples/toy_latents.py": "--pairs 24 --size 32",
}
ELSEWHERE = re.compile(  # or by test_online, test_label, test_videos and test_report
    "python (train.py .*(--rounds|nft|grpo|labels-1/pairs.csv|out/loop/reward)"
    "|-m (pages.label|real_data.prepare|pytest)|evaluate.py report)"
)


class Accepted(Exception):
    """Raised when a command has read its flags, in place of its work."""


@pytest.mark.parametrize("doc", DOCS)
def test_commands_are_accepted(doc, monkeypatch):
    parse = Parser.parse_known_args

    def stop(parser, argv=None, namespace=None):
        _, unknown = parse(parser, argv, namespace)
        assert not unknown, unknown
        raise Accepted

    for text in all_commands(doc):
        match = re.search(r"-m (\S+)|(\S+)\.py", text)
        if not match or match[1] == "pytest":
            continue
        script = (match[1] or match[2]).replace(".", "/") + ".py"
        assert (ROOT / script).exists(), text
        flags = shlex.split(text[match.end() :])
        flags = ["1" if re.fullmatch(r"[A-Z]+", flag) else flag for flag in flags]  # N, DIR
        if script == "train.py":
            settings_of(flags)
        elif script == "examples/wan.py":
            pytest.importorskip("diffusers")
            importlib.import_module("examples.wan").settings_of(flags)
        elif flags:
            monkeypatch.setattr(sys, "argv", [script, *flags])
            with monkeypatch.context() as patch, pytest.raises(Accepted):
                patch.setattr(Parser, "parse_known_args", stop)
                runpy.run_path(str(ROOT / script), run_name="__main__")


def run_elsewhere(words):
    return ELSEWHERE.match(shlex.join(words))


def shrunk_flags(script, flags):
    """Those of SHRUNK that the script reads."""
    shrunk = SHRUNK[script].split()
    if script == "train.py":
        shrunk = [flag for flag in shrunk if flag in with_read(flags, flag)]
    return shrunk


SECTIONS = [
    (doc, heading)
    for doc in RUN
    for heading, part in fenced(doc).items()
    if not all(run_elsewhere(words) for words in part)
]


@pytest.mark.parametrize(("doc", "heading"), SECTIONS)
def test_the_commands_of_a_section_run_one_after_the_other(
    doc, heading, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for words in fenced(doc)[heading]:
        if run_elsewhere(words):
            continue
        start = words.index("train.py") if words[0] == "torchrun" else 1
        script, *flags = words[start:]
        if script == "-m":
            script = flags.pop(0).replace(".", "/") + ".py"
        if "--preset" in flags:
            for name, config in PRESETS.items():
                monkeypatch.setitem(PRESETS, name, replace(config, dim=48, depth=3, heads=2))
        flags += shrunk_flags(script, flags)
        if words[0] == "torchrun":  # by two processes; one clip for each of 2 x --accum
            log = tmp_path / "log"
            assert together(command, [[*flags, "--batch=16"]], output=log) == [0, 0], (
                log.read_text()
            )
            continue
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert capsys.readouterr().out


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
