"""What operators are given and give: tensors in lists, tuples and dictionaries. Fast, as each operator asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def tensors(tree: Iterable[Any]) -> list[Tensor]:
    """The tensors that lists, tuples and dictionaries hold, however deep."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def leaves(tree: Iterable[Any]) -> list[Any]:
    """What lists, tuples and dictionaries hold, however deep."""
    found: list[Any] = []
    for each in tree:
        if isinstance(each, list | tuple):
            found += leaves(each)
        elif isinstance(each, dict):
            found += leaves(each.values())
        else:
            found.append(each)
    return found


def replaced(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same lists and dictionaries with their leaves changed; tuples become lists."""
    if isinstance(tree, list | tuple):
        return [replaced(change, each) for each in tree]
    if isinstance(tree, dict):
        return {key: replaced(change, each) for key, each in tree.items()}
    return change(tree)
