"""Imports point one way, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import adaptive_trainer

PACKAGE = Path(adaptive_trainer.__file__).parent

# From the left to the right: a room uses those to its right only, and rooms of one group do not use each other.
ROOMS = (
    ("cli",), ("training",), ("inference",), ("checkpoints",), ("planning",), ("prediction",), ("step",), ("data",),
    ("report",), ("models", "ladder"), ("memory",), ("config",), ("distributed",), ("utils",), ("oom",),
    ("recipe", "errors"),
)  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
OUTSIDE = {"__init__", "__main__"}  # which only load others, when they are asked
WITHOUT_TORCH = (
    "__init__",
    "__main__",
    "cli.main",
    "cli.help",
    "cli.sweep",
    "config.limit",
    "config.validate",
    "config.schema",
    "config.overrides",
    "report.earlier",
    "errors",
    "recipe",
    "utils.files",
    "utils.kernel_choices",
    "utils.launch",
    "data.images.folders",
    "ladder.resolve",
    "ladder.rung",
    "config.mistakes",
    "utils.screen",
    "utils.tables",
    "checkpoints.trust",
)
WITHOUT_HYDRA = ("errors", "utils", "oom", "config", "memory", "ladder", "models", "step")  # rooms to use alone
CORE = ("step", "oom", "memory", "ladder")
BESIDE_THE_CORE = ("hydra", "timm", "torchvision", "adaptive_trainer.prediction", "adaptive_trainer.planning")
HEAVY = {"torch", "torchvision", "timm", "numpy", "sklearn", "PIL", "tqdm"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere in the tree, those for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The module of this package that an imported name belongs to; None where it is another package's."""
    package, _, rest = name.partition(".")
    if package != "adaptive_trainer":
        return None
    while rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


def at_import_time(tree: ast.Module) -> ast.Module:
    """The statements that run on import: no bodies of functions, nothing for type checkers."""

    class Runs(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            is_for_checkers = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if is_for_checkers else self.generic_visit(node)

    result: ast.Module = Runs().visit(tree)
    return result


def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def room_of(name: str) -> str:
    return name.partition(".")[0]


IN_ROOMS = sorted(MODULES.keys() - OUTSIDE)


@pytest.mark.parametrize("name", IN_ROOMS)
def test_rooms_use_those_to_their_right(name: str) -> None:
    used = {
        other for other in map(own, imports(parsed(name))) if other and "." in other and room_of(other) != room_of(name)
    }
    wrong = sorted(other for other in used if RANK.get(room_of(other), -1) <= RANK[room_of(name)])
    assert not wrong, f"{name} imports {', '.join(wrong)}, whose room is not to the right of its own in ROOMS"


@pytest.mark.parametrize("room", RANK)
def test_modules_of_a_room_import_in_no_circle(room: str) -> None:
    modules = {name for name in MODULES if name.startswith(f"{room}.") and not name.endswith("__init__")}
    graph = {name: {other for other in map(own, imports(parsed(name))) if other in modules} for name in modules}
    list(TopologicalSorter(graph).static_order())  # raises a CycleError


@pytest.mark.long
def test_the_core_loads_neither_hydra_nor_networks_nor_predictions() -> None:
    """Whoever takes an update, the answer to an out-of-memory or a ladder alone need not have the rest."""
    core = [name for name in IN_ROOMS if room_of(name) in CORE and not name.endswith("__init__")]
    code = (
        f"import importlib, sys\nfor name in {core!r}:\n    importlib.import_module('adaptive_trainer.' + name)\n"
        f"print([name for name in {BESIDE_THE_CORE!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_heavy_import_at_module_level(name: str) -> None:
    """Those of the package that it imports are on the list too, so the whole start of the command line is light."""
    names = list(imports(at_import_time(parsed(name))))
    assert not {imported.partition(".")[0] for imported in names} & HEAVY
    assert {own(imported) for imported in names} <= {None, *WITHOUT_TORCH}


@pytest.mark.parametrize("room", WITHOUT_HYDRA)
def test_no_room_of_the_training_step_loads_hydra(room: str) -> None:
    modules = [name for name in MODULES if room_of(name) == room]
    importing = {name: list(imports(at_import_time(parsed(name)))) for name in modules}
    assert not [name for name, names in importing.items() if any(each.startswith("hydra") for each in names)]
