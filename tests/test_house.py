"""The layers of the code: a small core, imports that point one way, no cycle."""

import ast
from functools import cache

import pytest
from readme import ROOT, modules

MODULES = modules()
FILES = list(MODULES.values())
CORE = ("flow", "flow_dpo", "flow_rwr", "nrg", "reward", "model", "data", "sample", "tasks")

# Who may import whom: a module those of its own floor, and of the floors before it here. A folder stands for all of its
# modules that are not named apart.
FLOORS = (
    {"world", "flow", "words", "runtime", "kernels"},
    {"attention", "lora", "flow_dpo", "flow_rwr", "online.flow_nft", "online.flow_grpo", "data"},
    {"real_data.pairs_csv", "real_data.video"},
    {"model"},
    {"reward", "nrg"},
    {"sample", "real_data"},
    {"judge", "trainer", "settings"},
    {"tasks"},
    {"online"},
    {"studies", "examples", "pages"},
    {"train", "evaluate"},
)
COMMANDS = {"train", "evaluate"}  # imported by nobody
NOT_FOR_LOSSES = {"model", "reward", "data"}
NOT_FOR_RUNTIME = {*CORE, "judge", "world"}


def lines_in(path):
    return len(path.read_text().splitlines())


def test_every_module_stands_in_a_known_room():
    there = {
        path
        for path in ROOT.rglob("*.py")
        if not path.relative_to(ROOT).parts[0].startswith((".", "out"))
    }
    there = {
        path
        for path in there
        if "tests" not in path.relative_to(ROOT).parts and path.name != "__init__.py"
    }
    assert there - set(FILES) == set()
    assert [name for name in MODULES if floor_of(name) is None] == []


def test_the_core_is_small():
    assert sum(lines_in(ROOT / f"{name}.py") for name in CORE) <= 1900


# ---------------------------------------------------------------------------------------------
# Imports


def floor_of(name, floors=FLOORS):
    """The floor of the longest part of a dotted name that stands in `floors`; None if none does."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for floor, names in enumerate(floors):
            if ".".join(parts[:length]) in names:
                return floor


def imported(source, known):
    """Names out of `known` that a module imports, inside functions as well. Not what a script opens when it is run as a
    command, in the block `if __name__ == "__main__"`, or by a name that is not written out."""
    found, tree = set(), ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [
                name
                for alias in node.names
                for name in (node.module, f"{node.module}.{alias.name}")
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [value.value for value in node.args if isinstance(value, ast.Constant)]
        found |= known & set(names)
    return found


@cache
def graph():
    return {
        name: imported(path.read_text(), MODULES.keys()) - {name} for name, path in MODULES.items()
    }


def heights(graph):
    """{module: how many floors it stands on, 0 without imports of ours}. ValueError, which names it, for a circle."""
    found = {}

    def height(name, way=()):
        if name in way:
            raise ValueError(" -> ".join([*way[way.index(name) :], name]))
        if name not in found:
            found[name] = 1 + max(
                (height(other, (*way, name)) for other in graph[name]), default=-1
            )
        return found[name]

    return {name: height(name) for name in graph}


def test_imports_are_found_and_circles_named():
    known = {"a", "b.c", "b.d", "e", "f", "g"}
    text = "import a\ndef f():\n    from b import c, x\n    import_module('e')\n"
    text += "if __name__ == '__main__':\n    import f\n"
    assert imported(text, known) == {"a", "b.c", "e"}
    assert imported("from b.d import c\nimport b", known) == {"b.d"}
    assert heights({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}
    with pytest.raises(ValueError, match="a -> b -> a"):
        heights({"a": {"b"}, "b": {"a"}})


def test_imports_make_no_circle():
    heights(graph())  # raises for a circle


def test_imports_point_one_way():
    assert [name for name in MODULES if floor_of(name) is None] == []
    up = [
        (name, other)
        for name, others in graph().items()
        for other in others
        if floor_of(other) > floor_of(name)
    ]
    assert up == []


def test_wings_and_data_know_no_model():
    used = {(name, other) for name, others in graph().items() for other in others}
    assert [
        (name, other)
        for name, other in used
        if name.startswith("runtime.") and other in NOT_FOR_RUNTIME
    ] == []
    for name, unknown in {
        "data": {"model", "reward"},
        "flow_dpo": NOT_FOR_LOSSES,
        "flow_rwr": NOT_FOR_LOSSES,
    }.items():
        assert graph()[name] & unknown == set()
