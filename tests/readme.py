"""Reading the Markdown files: sections, backticks and commands; and which modules there are."""

import re
import shlex
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("kernels", "runtime", "real_data", "online", "studies", "examples", "pages")
# The files that people write; results/*.md are written by the studies
FOLDERS = [ROOT / part for part in ("", "docs", "weights", "examples")]
DOCS = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted(folder.glob("*.md"))]

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
COMMAND = re.compile(r" *(?:\$ )?((?:\w+=\S* +)*(?:python|torchrun|pip) .*)")


def modules(root=ROOT):
    """{dotted name: path} of every module at the top level and in the wings."""
    paths = [*root.glob("*.py"), *(path for wing in WINGS for path in (root / wing).rglob("*.py"))]
    names = {path: path.relative_to(root).with_suffix("").parts for path in sorted(paths)}
    return {".".join(parts): path for path, parts in names.items() if parts[-1] != "__init__"}


def prose(doc):
    return FENCE.sub("", (ROOT / doc).read_text())


def spans(text):
    """What stands in backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def sections(text):
    """{heading: text below it}"""
    _, *parts = re.split(r"^#+ +(.*)\n", text, flags=re.M)
    return dict(zip(parts[::2], parts[1::2]))


def commands(text):
    """[(words of a command, lines of output below it)], without pip's."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not (match := COMMAND.fullmatch(line)):
            for _, output in found[-1:]:
                output.append(line)
            continue
        lexer = shlex.shlex(match[1], posix=True, punctuation_chars=";&|")  # leaves out comments
        lexer.whitespace_split = True
        for between, words in groupby(lexer, {";", "&&", "&", "|"}.__contains__):
            words = list(words)
            while re.match(r"\w+=", words[0]):
                del words[0]  # a variable of the environment
            if not between and words[0] != "pip":
                found.append((words, []))
    return found


def fenced(doc):
    """{heading: commands in the fences below it}"""
    text, found = (ROOT / doc).read_text(), {}
    for fence in FENCE.finditer(text):
        if fence[1] in ("", "sh", "bash", "console") and (inside := commands(fence[2])):
            *_, heading = sections(FENCE.sub("", text[: fence.start()]))
            found.setdefault(heading, []).extend(inside)
    return found


def all_commands(doc):
    """Every command of a file once, as text."""
    found = sum(fenced(doc).values(), [])
    for span in spans(prose(doc)):
        found += commands(span)
    return dict.fromkeys(shlex.join(words) for words, _ in found)
