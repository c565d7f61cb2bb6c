"""Follows a forward pass operator by operator, and gives autograd notes in place of tensors that can be made again.

The network's code runs once, as it is: what runs again are single operators, on the tensors that they had. So hooks of
modules, running statistics and random numbers are as without recomputation, and the bits are the same.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_trainer.models.recomputing.operators import (
    UNFILLED,
    Kind,
    again,
    changed_by,
    counted_by,
    kind_of,
    surroundings,
)
from adaptive_trainer.models.recomputing.plan import Level
from adaptive_trainer.models.recomputing.trees import replaced, tensors
from adaptive_trainer.models.recomputing.values import Kept, Op, Segment, Value

# Bytes for each sample, under which a tensor is kept: such as pooled features, gates and statistics of channels.
SMALL = 16 * 1024
WHOLE = (Level.WHOLE, Level.MOST, Level.LEAST)


class Keeper(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Decides for each tensor of one forward pass whether it is kept or made again.

    Args:
        levels: of parts of the network, by the identity of the module.
        rest: the level of all else.
        least: bytes under which a tensor is not worth making again.
        keep: keeps a tensor.
    """

    def __init__(
        self, levels: Mapping[int, Level], rest: Level, least: int, keep: Callable[[Tensor], Kept] = Kept
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._levels = levels
        self._level = [rest]
        self._around = surroundings()
        self._least = least
        self._whole = self._segment(rest, None)  # of the innermost part that is recomputed as a whole
        self._cheap: Segment | None = None  # since the last dear operator
        self._keep = keep
        self._notes = _Notes(keep)
        self._number = 0
        self._thread = threading.get_ident()

    def __enter__(self) -> Keeper:
        """Follow what runs from here on in this thread."""
        self._exits = ExitStack()
        for hook in (
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        ):
            self._exits.callback(hook.remove)
        self._exits.enter_context(saved_tensors_hooks(self._pack, _get))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Follow no longer; what is noted stays with the graph that autograd has built."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._exits.close()
        self._notes = _Notes(self._keep)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note how to run it again."""
        kwargs = kwargs or {}
        kind, changed = kind_of(func), changed_by(func, args, kwargs)
        before = self._notes.find(changed[0]) if len(changed) == 1 and args and changed[0] is args[0] else None
        op, owner = self._op(func, kind, args, kwargs, before, is_inplace=bool(changed))
        for tensor in (*changed, *counted_by(func, args)):  # now, as the line above may have kept one of them
            self._notes.written(tensor)
        out = func(*args, **kwargs)
        if op is not None and owner is not None:
            self._note(op, owner, out, least=0 if changed else self._least)
        if func._overloadpacket in UNFILLED:
            self._notes.unfilled(out)
        if kind is Kind.DEAR and self._is_large(out):
            self._cheap = None
        return out

    def _op(
        self, func: Any, kind: Kind, args: Any, kwargs: Any, before: Value | None, *, is_inplace: bool
    ) -> tuple[Op | None, Segment | None]:
        """The operator to be noted and the segment that runs it again; None where its results are kept."""
        if kind is Kind.KEPT:
            return None, None
        if is_inplace or kind is Kind.VIEW:
            # The result lies in its argument's memory, so it is made again where that one is, or not at all.
            first = before if is_inplace else self._notes.find(args[0])
            owner = None if first is None else self._made_here(first, args[0])
        else:
            owner = self._owner(kind)
        if owner is None or not self._can_run_again(args, kwargs, is_inplace=is_inplace):
            return None, None
        self._number += 1
        inputs = replaced(lambda leaf: self._input(leaf, owner, before, args[0] if args else None), list(args))
        named = replaced(lambda leaf: self._input(leaf, owner, before, None), kwargs)
        return Op(self._number, func, again(func, inputs), named), owner

    def _can_run_again(self, args: Any, kwargs: Any, *, is_inplace: bool) -> bool:
        given = tensors((args, kwargs))
        if not given or not all(map(_is_plain, given)):  # made of nothing, as by a factory
            return False
        return surroundings() == self._around and not (is_inplace and _overlap(given))

    def _made_here(self, value: Value, tensor: Tensor) -> Segment | None:
        """The segment that makes a value again, which is around what runs now; None where it is kept."""
        self._lift(value, tensor, self._inner)
        return value.owner

    @property
    def _inner(self) -> Segment | None:
        return self._cheap or self._whole

    def _owner(self, kind: Kind) -> Segment | None:
        if kind is Kind.CHEAP and self._level[-1] in (Level.CHEAP, Level.MOST):
            self._cheap = self._cheap or Segment(self._whole, self._around)
            return self._cheap
        return self._whole

    def _input(self, leaf: Any, owner: Segment, before: Value | None, changed: Any) -> Any:
        """What stands for an argument of an operator that `owner` runs again."""
        if not isinstance(leaf, Tensor):
            return leaf
        value = before if before is not None and leaf is changed else self._notes.find(leaf)
        if value is None:
            kept = self._notes.keep(leaf)
            kept.alias()  # the network may give the tensor other memory
            return kept
        if not (value.owner is not None and value.owner.is_within(owner)):
            self._lift(value, leaf, owner)
            if value.owner is None:
                return value
            if value.owner is not owner:
                value.is_wanted = True  # by a segment within its own
        return value

    def _lift(self, value: Value, tensor: Tensor, user: Segment | None) -> None:
        """Have a value made again by a segment that is around its user; where there is none, it is kept."""
        above = value.owner
        # Not to a cheap segment: its dear operators would be run again for it.
        while above is not None and not (user is not None and user.is_within(above) and self._suits(value, above)):
            above = above.parent
        if above is None:
            self._notes.kept(value, tensor)
        elif above is not value.owner:
            above.adopt(value)
            value.is_wanted = True  # by the segment that has made it until now

    @staticmethod
    def _suits(value: Value, segment: Segment) -> bool:
        return segment.is_whole or segment is value.owner

    def _note(self, op: Op, owner: Segment, out: Any, least: int) -> None:
        results = out if isinstance(out, tuple | list) else (out,)
        for index, tensor in enumerate(results):
            if not (isinstance(tensor, Tensor) and _is_plain(tensor) and tensor.untyped_storage().nbytes() >= least):
                continue
            if self._notes.find(tensor) is None:  # else it is the same one, as of `detach`
                value = Value(op, index, owner)
                op.results.append(weakref.ref(value))
                self._notes.put(tensor, value)

    def _is_large(self, out: Any) -> bool:
        return any(tensor.nbytes >= self._least for tensor in tensors((out,)))

    def _pack(self, tensor: Tensor | None) -> Value | Kept | None:
        """What autograd saves: a value where the tensor can be made again."""
        if tensor is None:
            return None
        value = self._notes.find(tensor)
        if value is None:
            return self._notes.save(tensor)
        self._lift(value, tensor, self._inner)
        value.is_wanted = True
        return value

    def _entered(self, module: nn.Module, _: Any) -> None:
        level = self._levels.get(id(module))
        if level is None or threading.get_ident() != self._thread:
            return
        self._level.append(level)
        before, self._cheap = self._cheap, None
        # Its input may be cheap: then it is made again as well.
        self._whole = self._segment(level, before or self._whole) or self._whole

    def _segment(self, level: Level, around: Segment | None) -> Segment | None:
        if level not in WHOLE:
            return None
        return Segment(around, self._around, is_whole=True, singly=level == Level.LEAST)

    def _left(self, module: nn.Module, *_: Any) -> None:
        if id(module) not in self._levels or threading.get_ident() != self._thread:
            return
        level, self._cheap = self._level.pop(), None
        if level in WHOLE and self._whole is not None:
            self._whole = self._whole.whole_around


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is described by how it lies in one storage."""
    return tensor.layout is torch.strided and not tensor.is_nested and not _is_wrapper(type(tensor))


@cache
def _is_wrapper(kind: type) -> bool:
    """Whether tensors of this class are made of others."""
    return hasattr(kind, "__tensor_flatten__")


def _overlap(given: list[Tensor]) -> bool:
    """Whether one lies in the memory of the first one and is not the same tensor."""
    first = given[0].untyped_storage()
    return any(each is not given[0] and each.untyped_storage() is first for each in given)


def _get(saved: Value | Kept | None) -> Any:
    return None if saved is None else saved.get()


# What would be lost if a storage were written, of all passes that are not done yet: the next pass may write a buffer
# that the last one has read. torch keeps one Python object per storage, alive as long as the storage is.
_users: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Kept]] = weakref.WeakKeyDictionary()


class _Notes:
    """What is known of the tensors that are alive, by their storages and how they lie in them."""

    def __init__(self, keep: Callable[[Tensor], Kept]) -> None:
        self._keep = keep
        self._values: weakref.WeakKeyDictionary[Any, dict[Any, Value]] = weakref.WeakKeyDictionary()
        self._unfilled: weakref.WeakSet[Any] = weakref.WeakSet()

    def find(self, tensor: Tensor) -> Value | None:
        """The value that a tensor is."""
        of_storage = self._values.get(tensor.untyped_storage()) if _is_plain(tensor) else None
        return None if of_storage is None else of_storage.get(_layout(tensor))

    def put(self, tensor: Tensor, value: Value) -> None:
        """Note that a tensor is this value."""
        self._values.setdefault(tensor.untyped_storage(), {})[_layout(tensor)] = value

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor as it is now."""
        kept = self._keep(tensor) if _is_plain(tensor) else Kept(tensor)
        return self._used(kept, tensor)

    def save(self, tensor: Tensor) -> Kept:
        """Keep a tensor for autograd, which means its memory: it refuses what was written since, if it can see that."""
        if not _is_plain(tensor) or tensor.untyped_storage() in self._unfilled:  # an operator is about to write there
            return Kept(tensor)
        kept = self._keep(tensor)
        return self._used(kept, tensor) if kept.is_copy else kept

    @staticmethod
    def _used(kept: Kept, tensor: Tensor) -> Kept:
        if _is_plain(tensor):
            _users.setdefault(tensor.untyped_storage(), weakref.WeakSet()).add(kept)
        return kept

    def kept(self, value: Value, tensor: Tensor) -> None:
        """Keep the tensor of a value."""
        value.keep(self.keep(tensor))
        of_storage = self._values.get(tensor.untyped_storage(), {})
        of_storage.pop(_layout(tensor), None)  # or this note would keep it to the end of the pass

    def unfilled(self, tensor: Tensor) -> None:
        """Note that nothing is in a tensor's memory yet."""
        if _is_plain(tensor):
            self._unfilled.add(tensor.untyped_storage())

    def written(self, tensor: Tensor) -> None:
        """A storage is about to be written: no tensor in it will be what was noted."""
        if not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        self._unfilled.discard(storage)
        self._values.pop(storage, None)
        for kept in list(_users.pop(storage, ())):
            kept.copy_before_write()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    bits = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.storage_offset(), tensor.shape, tensor.stride(), *bits
