"""Measure the package: lines, comments, longest classes and functions, arrows between rooms.

    python scripts/measure_code.py            # the table
    python scripts/measure_code.py --check    # exit 1 where a limit is passed

A room is a folder of the package. A folder in it has lines of its own; its imports count as the room's. A line of
comment carries a comment that is no directive for a tool.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "adaptive_trainer"
DIRECTIVE = re.compile(r"#\s*(type:|noqa|fmt:|pragma)")
MOST_LINES, MOST_OF_A_ROOM, MOST_OF_A_CLASS, MOST_OF_A_FUNCTION, MOST_ARROWS = 10_000, 1_600, 220, 50, 80
LEAST_COMMENTS = 0.045
MOST_TOUCHES = 10


@dataclass
class Room:
    """What was counted in a folder."""

    lines: int = 0
    comments: int = 0


def room_of(path: Path) -> str:
    """The folder of a module, as its dotted name in the package."""
    return ".".join(path.relative_to(PACKAGE).parent.parts) or "(top)"


def comment_lines(text: str) -> int:
    """Lines that carry a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({t.start[0] for t in tokens if t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string)})


def rooms_used(tree: ast.Module) -> Iterator[str]:
    """The rooms that a module imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE.name:
            for name in node.names:
                parts = f"{node.module}.{name.name}".split(".")[1:]
                yield parts[0] if (PACKAGE / parts[0]).is_dir() else "(top)"


def sized(tree: ast.Module, kinds: tuple[type[ast.stmt], ...]) -> Iterator[tuple[int, str]]:
    """Lines and name of every class or function."""
    for node in ast.walk(tree):
        if isinstance(node, kinds) and isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def touches_of_update(tree: ast.Module) -> int:
    """Places that read or write a field of an `Update`: an attribute of something named `update` that is not called."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return sum(
        isinstance(node, ast.Attribute)
        and id(node) not in called
        and (node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")) == "update"
        for node in ast.walk(tree)
    )


def main() -> int:
    """Print the table; 1 where a limit is passed and `--check` was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is passed")
    asked = parser.parse_args()
    rooms: defaultdict[str, Room] = defaultdict(Room)
    arrows: set[tuple[str, str]] = set()
    classes, functions, touches = [], [], {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, room = ast.parse(text), rooms[room_of(path)]
        where = str(path.relative_to(PACKAGE))
        room.lines += text.count("\n")
        room.comments += comment_lines(text)
        name = room_of(path).partition(".")[0]
        arrows |= {(name, used) for used in rooms_used(tree) if used != name and name != "(top)"}
        classes += [(size, f"{name} ({where})") for size, name in sized(tree, (ast.ClassDef,))]
        functions += [
            (size, f"{name} ({where})") for size, name in sized(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        if where != "step/update.py" and (count := touches_of_update(tree)):
            touches[where] = count
    for name, room in sorted(rooms.items(), key=lambda entry: -entry[1].lines):
        print(f"{room.lines:6}  {room.comments / room.lines:5.1%} comments  {name}")
    lines, comments = (sum(getattr(room, name) for room in rooms.values()) for name in ("lines", "comments"))
    found = [
        ("lines of the package", lines, MOST_LINES),
        ("lines of the largest room", max(room.lines for room in rooms.values()), MOST_OF_A_ROOM),
        ("arrows between rooms", len(arrows), MOST_ARROWS),
        ("fields of Update touched outside", sum(touches.values()), MOST_TOUCHES),
    ]
    for kind, sizes, most in (("class", classes, MOST_OF_A_CLASS), ("function", functions, MOST_OF_A_FUNCTION)):
        found.append((f"lines of the longest {kind}", max(sizes)[0], most))
        print("\n".join(f"{size:6}  lines: {kind} {name}" for size, name in sorted(sizes, reverse=True) if size > most))
    is_passed = comments / lines < LEAST_COMMENTS
    for what, value, most in found:
        is_passed = is_passed or value > most
        print(f"{what}: {value} (at most {most}){'  PASSED' if value > most else ''}")
    print(f"lines with a comment: {comments / lines:.1%} (at least {LEAST_COMMENTS:.1%})")
    print("fields of Update are touched in", ", ".join(f"{where}: {count}" for where, count in touches.items()))
    return 1 if asked.check and is_passed else 0


if __name__ == "__main__":
    sys.exit(main())
