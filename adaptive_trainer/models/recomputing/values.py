"""Tensors of a forward pass that can be made again, the operators that make them, and segments of the pass.

References lead backward only: from what autograd has saved to the value, to its operator, to that one's arguments. So
as the backward pass lets go of what it has used, values and what they were made of are freed in their order, as the
tensors would be.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from adaptive_trainer.models.recomputing.operators import surroundings, written
from adaptive_trainer.models.recomputing.trees import leaves, replaced


class Changed(RuntimeError):
    """A tensor that is needed in the backward pass was changed in place after its use."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place after the "
            "forward pass; change a clone"
        )


class Kept:
    """A tensor that is kept, and its version, which says whether it was changed since."""

    is_copy = False  # of what the tensor held, rather than its memory

    __slots__ = ("__weakref__", "counter", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # A node of autograd that saves its own result would hold itself by it, and after an error nothing frees it.
        self.tensor = tensor if tensor.is_leaf and tensor.requires_grad else without_node(tensor)
        self.counter = self.tensor  # what counts versions; in a dispatch mode a further alias has a count of its own
        self.version = tensor._version

    def alias(self) -> None:
        """Keep to the memory that the tensor has now."""
        self.tensor = self.tensor.detach()

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            Changed: it is not what it was.
        """
        if self.counter._version != self.version:
            raise Changed(self.tensor)
        return self.tensor

    def copy_before_write(self) -> None:
        """Keep what it holds now, as its memory is about to be written."""
        self.tensor = self.counter = copied(self.tensor)
        self.version = self.tensor._version


def without_node(tensor: Tensor) -> Tensor:
    """The same memory and count of versions, but no way to the node of autograd that has made it."""
    if type(tensor) is not Tensor:  # a class of its own is told by dispatch alone what a tensor is
        return tensor
    # Within a dispatch mode autograd has no part in what runs, and it is autograd that shares the count.
    key = torch._C.DispatchKey.ADInplaceOrView
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch._C._DisableTorchDispatch():
        return tensor.detach()


def copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent,), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride())


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

    Attributes:
        values: those among its arguments.
    """

    __slots__ = ("args", "func", "kwargs", "number", "results", "values")

    def __init__(self, number: int, func: Any, args: Any, kwargs: Any) -> None:
        self.number = number
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.values = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Value)]
        self.results: list[weakref.ref[Value]] = []

    def run(self, made: dict[Value, Tensor], lent: set[int]) -> Any:
        """Run it again, on tensors that were made again and on those that are there.

        Args:
            made: anew, for this replay alone.
            lent: identities of storages that others need as they are.
        """

        def tensor(leaf: Any) -> Any:
            if leaf in made if isinstance(leaf, Value) else not isinstance(leaf, Kept):
                return made[leaf] if isinstance(leaf, Value) else leaf
            got = leaf.get()
            lent.add(_memory(got))
            return got

        args = replaced(tensor, self.args)
        # Only such are noted as write their first argument: into a copy, where its memory is lent.
        if written(self.func) and _memory(args[0]) in lent:
            args[0] = copied(args[0])
        return self.func(*args, **replaced(tensor, self.kwargs))


def _memory(tensor: Tensor) -> int:
    return id(tensor.untyped_storage()) if tensor.layout is torch.strided else id(tensor)


class Segment:
    """A stretch of the forward pass that is run again, within another one or alone.

    Args:
        parent: the one that it lies in.
        around: the surroundings of its operators.
        is_whole: dear operators are run again too.
        singly: run again for each value that is asked for, of which less is held at a time; else once for all.
    """

    def __init__(
        self, parent: Segment | None, around: tuple[Any, ...], *, is_whole: bool = False, singly: bool = False
    ) -> None:
        self.parent = parent
        self.is_whole = is_whole
        self.singly = singly
        self._around = around
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
        """Make a value again, and with it all others that are wanted and not there.

        Raises:
            RuntimeError: global settings that kernels depend on are not those of the forward pass.
        """
        if self._around != surroundings():
            raise RuntimeError(
                "torch's global settings (default dtype, torch.backends, deterministic algorithms) are others in the "
                "backward pass than in the forward pass, so recomputed activations would be others too; set them once"
            )
        alive = [asked] if self.singly else [ref() for ref in self._values]
        wanted = {v for v in alive if v is not None and v.owner is self and v.is_wanted and not v.is_there}
        ops = self._needed(wanted)
        uses = Counter(value for op in ops for value in op.values)
        made: dict[Value, Tensor] = {}
        lent: set[int] = set()
        with torch.no_grad(), torch._C._DisableAutocast():  # casts are operators of their own
            for op in ops:
                for value, result in self._results(op, op.run(made, lent)):
                    if value in wanted:
                        value.hold(result)
                        lent.add(_memory(result))
                    if uses[value]:
                        made[value] = result
                for value in op.values:
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
            for value in op.values:
                if value.is_there:
                    continue
                if value.owner is not None and value.owner.is_within(self):
                    waiting.append(value.op)
                else:
                    value.get()  # of a segment around this one, which is run again first
        return [found[number] for number in sorted(found)]

    @staticmethod
    def _results(op: Op, results: Any) -> Iterator[tuple[Value, Tensor]]:
        results = results if isinstance(results, tuple | list) else (results,)
        for value in (ref() for ref in op.results):
            if value is not None:
                yield value, results[value.index]
