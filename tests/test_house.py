"""The house's rules: short files that say what they are, short losses and samplers, nothing written twice."""

import ast
from collections import defaultdict

import pytest
from readme import ROOT

FILES = sorted(ROOT.glob("*.py"))
LONGEST = {"_loss": 30, "_step": 30, "sample": 25, "guide": 25}  # lines of a function whose name ends so


def lines_of(function):
    """How many lines a function has, its docstring aside."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert len(ast.get_docstring(ast.parse(text)).split()) > 20


def test_losses_and_samplers_are_short():
    trees = [ast.parse(path.read_text()) for path in FILES]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    sizes = [(f.name, lines_of(f), most) for f in functions for end, most in LONGEST.items() if f.name.endswith(end)]
    assert {"flow_dpo_loss", "flow_dpo_step", "flow_rwr_step", "btt_loss", "sample", "guide"} <= {
        n for n, _, _ in sizes
    }
    assert [(name, size) for name, size, most in sizes if size > most] == []


def test_no_six_lines_stand_in_two_files():
    places = defaultdict(set)
    for path in FILES:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        for i in range(len(lines) - 5):
            places["\n".join(lines[i : i + 6])].add(path.name)
    assert [sorted(files) for files in places.values() if len(files) > 1] == []
