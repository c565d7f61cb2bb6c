"""Print constraints that hold this package's own dependencies at the lowest versions that pyproject.toml allows.

`make lowest` runs the tests with them. What the dependencies need themselves is left to pip; the tools that run the
tests are those of constraints.txt.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"[A-Za-z0-9._-]+")


def lowest(requirement: str) -> str:
    """`torch>=2.11` gives `torch==2.11`.

    Raises:
        ValueError: the requirement has no lower bound.
    """
    name, bound = NAME.match(requirement), re.search(r">=\s*([0-9.]+)", requirement)
    if name is None or bound is None:
        raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound; write one, as in 'numpy>=2.0'")
    return f"{name[0]}=={bound[1]}"


def main() -> None:
    """Print one constraint a line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    direct = [lowest(requirement) for requirement in project["project"]["dependencies"]]
    own = {line.partition("==")[0] for line in direct}
    tools = {NAME.match(tool)[0] for tool in project["dependency-groups"]["dev"]} - own  # type: ignore[index]
    locked = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    print("\n".join([*direct, *(line for line in locked if line.partition("==")[0] in tools)]))


if __name__ == "__main__":
    main()
