"""Reading the Markdown files: sections, backticks and commands; and which modules there are."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("kernels", "runtime", "real_data", "online", "studies", "examples", "pages")
# The files that people write; results/*.md are written by the studies
FOLDERS = [ROOT / part for part in ("", "docs", "weights", "examples")]
DOCS = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted(folder.glob("*.md"))]

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
COMMAND = re.compile(r"(?:\$ |pip .* && )?((?:python|torchrun) .*)")


def modules(root=ROOT):
    """{dotted name: path} of every module at the top level and in the wings."""
    paths = [*root.glob("*.py"), *(path for wing in WINGS for path in (root / wing).rglob("*.py"))]
    names = {path: path.relative_to(root).with_suffix("").parts for path in sorted(paths)}
    return {".".join(parts): path for path, parts in names.items() if parts[-1] != "__init__"}


def prose(doc):
    return FENCE.sub("", (ROOT / doc).read_text())


def sections(text):
    """{heading: text below it}"""
    _, *parts = re.split(r"^#+ +(.*)\n", text, flags=re.M)
    return dict(zip(parts[::2], parts[1::2]))


def commands(text):
    """[words of a command], without pip's."""
    lines = text.replace("\\\n", " ").splitlines()
    matches = [COMMAND.fullmatch(line.strip()) for line in lines]
    return [shlex.split(match[1], comments=True) for match in matches if match]


def fenced(doc):
    """{heading: commands in the fences below it}"""
    text, found = (ROOT / doc).read_text(), {}
    for fence in FENCE.finditer(text):
        if fence[1] in ("", "sh", "bash", "console") and (inside := commands(fence[2])):
            *_, heading = sections(FENCE.sub("", text[: fence.start()]))
            found.setdefault(heading, []).extend(inside)
    return found


def all_commands(doc):
    """Every command of a file once, as text: those of its fences and those in backticks."""
    found = sum(fenced(doc).values(), [])
    for span in re.findall(r"`([^`]+)`", prose(doc)):
        found += commands(" ".join(span.split()))
    return dict.fromkeys(shlex.join(words) for words in found)
