"""The layers of the code: a small core, imports that point one way, no cycle, no long file."""

import ast
from functools import cache
from graphlib import TopologicalSorter

from readme import modules

MODULES = modules()
CORE = ("flow", "flow_dpo", "flow_rwr", "nrg", "reward", "model", "data", "sample", "tasks")

# A module may import those of its own floor and of the floors above it in this list. A folder
# stands for all of its modules that are not named themselves.
FLOORS = (
    {"world", "flow", "words", "flags", "runtime", "kernels"},
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
    """The floor of the longest part of a dotted name that stands in FLOORS."""
    while name:
        for floor, names in enumerate(FLOORS):
            if name in names:
                return floor
        name = name.rpartition(".")[0]
    raise ValueError("a module that stands on no floor")


@cache
def graph():
    """{module: our modules that it imports, but for those of its block `if __name__ == ...`}"""
    found = {}
    for module, path in MODULES.items():
        names, tree = set(), ast.parse(path.read_text())
        tree.body = [node for node in tree.body if "__name__ == " not in ast.unparse(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names & MODULES.keys()
    return found


def length(path):
    return len(path.read_text().splitlines())


def test_the_core_is_small_and_no_file_is_long():
    assert sum(length(MODULES[name]) for name in CORE) <= 1900
    assert max(map(length, MODULES.values())) <= 350


def test_imports_point_one_way_without_a_cycle():
    edges = [(name, other) for name, others in graph().items() for other in others]
    assert [edge for edge in edges if floor_of(edge[1]) > floor_of(edge[0])] == []
    TopologicalSorter(graph()).prepare()  # CycleError names the cycle
