"""The layers of the code: a small core, imports that point one way, no cycle."""

import ast
from functools import cache
from graphlib import TopologicalSorter

from readme import ROOT, modules

MODULES = modules()
CORE = ("flow", "flow_dpo", "flow_rwr", "nrg", "reward", "model", "data", "sample", "tasks")

# A module may import those of its own floor and of the floors above it in this list. A folder
# stands for all of its modules that are not named themselves.
FLOORS = (
    {"world", "flow", "words", "runtime", "kernels"},
    {"attention", "lora", "flow_dpo", "flow_rwr", "online.flow_nft", "online.flow_grpo", "data"},
    {"real_data.pairs_csv", "real_data.video", "pictures"},
    {"model"},
    {"reward", "nrg"},
    {"settings"},
    {"sample", "real_data"},
    {"judge", "trainer"},
    {"ranking"},
    {"tasks"},
    {"online"},
    {"studies", "examples", "pages"},
    {"train", "evaluate"},
)


def floor_of(name):
    """The floor of the longest part of a dotted name that stands in FLOORS; None if none does."""
    while name:
        for floor, names in enumerate(FLOORS):
            if name in names:
                return floor
        name = name.rpartition(".")[0]


def imported(source):
    """Our modules that a module imports, inside functions as well, but not those of the block
    `if __name__ == "__main__"`."""
    names, tree = set(), ast.parse(source)
    tree.body = [node for node in tree.body if "__name__ == " not in ast.unparse(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


@cache
def graph():
    return {name: imported(path.read_text()) for name, path in MODULES.items()}


def test_every_module_stands_on_a_floor():
    ours = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    folders = {path.relative_to(ROOT).parts[0] for path in ours if path not in MODULES.values()}
    assert {name for name in folders if not name.startswith((".", "out"))} == {"tests"}
    assert [name for name in MODULES if floor_of(name) is None] == []


def test_the_core_is_small():
    assert sum(len(MODULES[name].read_text().splitlines()) for name in CORE) <= 1900


def test_imports_point_one_way_without_a_cycle():
    up = [
        (name, other)
        for name, others in graph().items()
        for other in others
        if floor_of(other) > floor_of(name)
    ]
    assert up == []
    assert "data" not in graph()["flow_dpo"] | graph()["flow_rwr"]
    TopologicalSorter(graph()).prepare()  # CycleError names the cycle
