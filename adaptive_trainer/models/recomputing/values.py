"""Tensors of a forward pass that can be made again, the operators that make them, and segments of the pass.

References lead backward only: from what autograd has saved to the value, to its operator, to that one's arguments. So
as the backward pass lets go of what it has used, values and what they were made of are freed in their order, as the
tensors would be.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from adaptive_trainer.models.recomputing.operators import written


class Changed(RuntimeError):
    """A tensor that is needed in the backward pass was changed in place after its use."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place after the "
            "forward pass; change a clone"
        )


class Kept:
    """A tensor that is kept, and its version, which says whether it was changed since."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            Changed: it is not what it was.
        """
        if self.tensor._version != self.version:
            raise Changed(self.tensor)
        return self.tensor

    def copy_before_write(self) -> None:
        """Keep what it holds now, as its memory is about to be written."""
        self.tensor = self.tensor.clone()
        self.version = self.tensor._version


class Value:
    """A tensor that can be made again.

    Attributes:
        op: makes it; None once it is kept.
        index: which of the operator's results it is.
        owner: the segment that makes it again; None once it is kept.
        is_wanted: the backward pass, or a segment within its owner's, will ask for it.
    """

    __slots__ = ("__weakref__", "_kept", "index", "is_wanted", "op", "owner")

    def __init__(self, op: Op, index: int, owner: Segment) -> None:
        self.op: Op | None = op
        self.index = index
        self.owner: Segment | None = owner
        self.is_wanted = False
        self._kept: Kept | None = None
        owner.adopt(self)

    @property
    def is_there(self) -> bool:
        """Whether the tensor is there."""
        return self._kept is not None

    def keep(self, kept: Kept) -> None:
        """It is kept, and not made again."""
        self._kept, self.op, self.owner = kept, None, None

    def hold(self, tensor: Tensor) -> None:
        """Hold the tensor, which was made again, until nobody needs this value."""
        self._kept = Kept(tensor)

    def get(self) -> Tensor:
        """The tensor, made again where it is not there."""
        if self._kept is None and self.owner is not None:
            self.owner.replay(self)
        if self._kept is None:
            raise RuntimeError("an activation was asked for that nothing was noted of")
        return self._kept.get()


class Op:
    """An operator that has run, and how to run it again.

    Args:
        number: its place in the order of the forward pass.
        args, kwargs: with `Value` and `Kept` in place of tensors.
    """

    __slots__ = ("args", "func", "kwargs", "number", "results")

    def __init__(self, number: int, func: Any, args: Any, kwargs: Any) -> None:
        self.number = number
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.results: list[weakref.ref[Value]] = []

    def values(self) -> Iterator[Value]:
        """The values among its arguments."""
        return (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Value))

    def run(self, made: dict[Value, Tensor]) -> Any:
        """Run it again, on tensors that were made again and on those that are there."""

        def tensor(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return made[leaf] if leaf in made else leaf.get()
            return leaf.get() if isinstance(leaf, Kept) else leaf

        args = replaced(tensor, self.args)
        for place in written(self.func):  # into a copy, where the argument is needed as it is
            leaf = self.args[place] if place < len(self.args) else None
            if isinstance(leaf, Kept) or (isinstance(leaf, Value) and (leaf.is_there or leaf.is_wanted)):
                args[place] = args[place].clone()
        return self.func(*args, **replaced(tensor, self.kwargs))


class Segment:
    """A stretch of the forward pass that is run again, within another one or alone.

    Args:
        parent: the one that it lies in.
        is_whole: dear operators are run again too.
        singly: run again for each value that is asked for, of which less is held at a time; else once for all.
    """

    def __init__(self, parent: Segment | None, *, is_whole: bool = False, singly: bool = False) -> None:
        self.parent = parent
        self.is_whole = is_whole
        self.singly = singly
        self._values: list[weakref.ref[Value]] = []

    @property
    def whole_around(self) -> Segment | None:
        """The innermost whole segment that it lies in."""
        found = self.parent
        while found is not None and not found.is_whole:
            found = found.parent
        return found

    def adopt(self, value: Value) -> None:
        """Make a value again from now on."""
        value.owner = self
        self._values.append(weakref.ref(value))

    def is_within(self, other: Segment | None) -> bool:
        """Whether it is the other one or lies within it."""
        segment: Segment | None = self
        while segment is not None:
            if segment is other:
                return True
            segment = segment.parent
        return False

    def replay(self, asked: Value) -> None:
        """Make a value again, and with it all others that are wanted and not there."""
        alive = [asked] if self.singly else [ref() for ref in self._values]
        wanted = {v for v in alive if v is not None and v.owner is self and v.is_wanted and not v.is_there}
        ops = self._needed(wanted)
        uses = Counter(value for op in ops for value in op.values())
        made: dict[Value, Tensor] = {}
        with torch.no_grad(), torch._C._DisableAutocast():  # casts are operators of their own
            for op in ops:
                self._hold(op, op.run(made), made, uses, wanted)
                for value in op.values():
                    uses[value] -= 1
                    if not uses[value]:
                        made.pop(value, None)

    def _needed(self, wanted: Iterable[Value]) -> list[Op]:
        """The operators that make these values, in the order in which they have run."""
        found: dict[int, Op] = {}
        waiting = [value.op for value in wanted]
        while waiting:
            op = waiting.pop()
            if op is None or op.number in found:
                continue
            found[op.number] = op
            for value in op.values():
                if value.is_there:
                    continue
                if value.owner is not None and value.owner.is_within(self):
                    waiting.append(value.op)
                else:
                    value.get()  # of a segment around this one, which is run again first
        return [found[number] for number in sorted(found)]

    @staticmethod
    def _hold(op: Op, results: Any, made: dict[Value, Tensor], uses: Counter[Value], wanted: set[Value]) -> None:
        results = results if isinstance(results, tuple | list) else (results,)
        for value in (ref() for ref in op.results):
            if value is None:
                continue
            if value in wanted:
                value.hold(results[value.index])
            if uses[value]:
                made[value] = results[value.index]


def leaves(tree: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold, however deep."""
    if isinstance(tree, list | tuple):
        for each in tree:
            yield from leaves(each)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    else:
        yield tree


def replaced(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same lists and dictionaries with their leaves changed; tuples become lists."""
    if isinstance(tree, list | tuple):
        return [replaced(change, each) for each in tree]
    if isinstance(tree, dict):
        return {key: replaced(change, each) for key, each in tree.items()}
    return change(tree)
