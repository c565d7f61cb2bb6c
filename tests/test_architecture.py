"""Imports point one way, and the command line starts without torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptive_trainer

PACKAGE = Path(adaptive_trainer.__file__).parent

# Top to bottom: a module imports modules of lower lines only, or of its own line from the left to the right.
LAYERS = """
__main__
cli
trainer
arguments
largest
stage
loop
supply
measure
session
resume
summary
caching
feed
checkpoint
contents
forecast
engine leak
graph compiling
proof
update
transaction
plan_tasks
report
descent
data
datasets
image_files
splitting
transforms
store
fingerprint
augment
preprocessing
predicting
planning
memory.image_size
models optimizers
position process host_state
target
memory.plan_cache
memory.predict memory.trace memory.fake memory.plain memory.scratch
memory.capacity
memory.card
memory.usage memory.allocator
losses
belongings randomness
oom device stepping
earlier trust ladder layout
folders
checks
config
mistakes
search
files
progress tables
screen
errors
"""
ORDER = {name: rank for rank, name in enumerate(LAYERS.split())}
WITHOUT_TORCH = (
    "__init__", "__main__", "cli", "checks", "config", "earlier", "errors", "files", "folders", "ladder", "mistakes",
    "screen", "tables", "trust",
)  # fmt: skip
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


def test_every_module_has_its_layer() -> None:
    modules = {name for name in MODULES if not name.endswith("__init__")}
    missing = sorted(modules - ORDER.keys())
    assert not missing, f"give {', '.join(missing)} a place in LAYERS of {Path(__file__).name}"
    assert len(ORDER) == len(LAYERS.split()), "a module has two places in LAYERS"
    gone = sorted(ORDER.keys() - modules)
    assert not gone, f"{', '.join(gone)} in LAYERS is no module any more"


@pytest.mark.parametrize("name", sorted(ORDER))
def test_imports_point_down(name: str) -> None:
    below = {own(imported) for imported in imports(parsed(name))} - {None, "__init__", "memory.__init__", "memory"}
    wrong = sorted(str(other) for other in below if ORDER.get(str(other), -1) <= ORDER[name])
    assert not wrong, f"{name} imports {', '.join(wrong)}, which LAYERS has above it or not at all"


def test_imports_inside_functions_are_seen() -> None:
    assert {own(name) for name in imports(parsed("cli"))} >= {"oom", "plan_tasks", "trainer", "config", "errors"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_heavy_import_at_module_level(name: str) -> None:
    """Those of the package that it imports are on the list too, so the whole start of the command line is light."""
    names = list(imports(at_import_time(parsed(name))))
    assert not {imported.partition(".")[0] for imported in names} & HEAVY
    assert {own(imported) for imported in names} <= {None, *WITHOUT_TORCH}
