"""Follows a forward pass operator by operator, and gives autograd notes in place of tensors that can be made again.

The network's code runs once, as it is: what runs again are single operators, on the tensors that they had. So hooks of
modules, running statistics and random numbers are as without recomputation, and the bits are the same.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_trainer.models.recomputing.operators import Kind, again, kind_of, written
from adaptive_trainer.models.recomputing.plan import Level
from adaptive_trainer.models.recomputing.values import Kept, Op, Segment, Value, leaves, replaced

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
        self._least = least
        self._whole: Segment | None = None  # of the innermost part that is recomputed as a whole
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
        changed = [args[place] for place in written(func) if place < len(args) and isinstance(args[place], Tensor)]
        changed += [kwargs["out"]] if isinstance(kwargs.get("out"), Tensor) else []
        before = self._notes.find(changed[0]) if len(changed) == 1 and changed[0] is args[0] else None
        for tensor in changed:
            self._notes.written(tensor)
        op, owner = self._op(func, args, kwargs, before, is_inplace=bool(changed))
        out = func(*args, **kwargs)
        if op is not None and owner is not None:
            self._note(op, owner, out, least=0 if changed else self._least)
        if kind_of(func) is Kind.DEAR and self._is_large(out):
            self._cheap = None
        return out

    def _op(
        self, func: Any, args: Any, kwargs: Any, before: Value | None, *, is_inplace: bool
    ) -> tuple[Op | None, Segment | None]:
        """The operator to be noted and the segment that runs it again; None where its results are kept."""
        kind = kind_of(func)
        if is_inplace or kind is Kind.VIEW:
            # The result lies in its argument's memory, so it is made again where that one is, or not at all.
            first = before if is_inplace else self._notes.find(args[0])
            owner = None if first is None else self._made_here(first, args[0])
            if owner is None or kind is Kind.KEPT or (is_inplace and _overlap(args)):
                return None, None
        elif (owner := self._owner(kind)) is None:
            return None, None
        self._number += 1
        inputs = replaced(lambda leaf: self._input(leaf, owner, before, args[0] if args else None), list(args))
        named = replaced(lambda leaf: self._input(leaf, owner, before, None), kwargs)
        if not any(isinstance(leaf, Value | Kept) for leaf in leaves((inputs, named))):
            return None, None  # made of nothing, as by a factory
        return Op(self._number, func, again(func, inputs), named), owner

    def _made_here(self, value: Value, tensor: Tensor) -> Segment | None:
        """The segment that makes a value again, which is around what runs now; None where it is kept."""
        self._lift(value, tensor, self._inner)
        return value.owner

    @property
    def _inner(self) -> Segment | None:
        return self._cheap or self._whole

    def _owner(self, kind: Kind) -> Segment | None:
        if kind is Kind.KEPT:
            return None
        if kind is Kind.CHEAP and self._level[-1] in (Level.CHEAP, Level.MOST):
            self._cheap = self._cheap or Segment(self._whole)
            return self._cheap
        return self._whole

    def _input(self, leaf: Any, owner: Segment, before: Value | None, changed: Any) -> Any:
        """What stands for an argument of an operator that `owner` runs again."""
        if not isinstance(leaf, Tensor):
            return leaf
        value = before if before is not None and leaf is changed else self._notes.find(leaf)
        if value is None:
            return self._notes.keep(leaf)
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

    @staticmethod
    def _suits(value: Value, segment: Segment) -> bool:
        return segment.is_whole or segment is value.owner

    def _note(self, op: Op, owner: Segment, out: Any, least: int) -> None:
        results = out if isinstance(out, tuple | list) else (out,)
        for index, tensor in enumerate(results):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().nbytes() < least:
                continue
            if self._notes.find(tensor) is None:  # else it is the same one, as of `detach`
                value = Value(op, index, owner)
                op.results.append(weakref.ref(value))
                self._notes.put(tensor, value)

    def _is_large(self, out: Any) -> bool:
        return any(isinstance(leaf, Tensor) and leaf.nbytes >= self._least for leaf in leaves(out))

    def _pack(self, tensor: Tensor) -> Value | Kept:
        """What autograd saves: a value where the tensor can be made again."""
        value = self._notes.find(tensor)
        if value is None:
            return self._notes.keep(tensor)
        self._lift(value, tensor, self._inner)
        value.is_wanted = True
        return value

    def _entered(self, module: nn.Module, _: Any) -> None:
        level = self._levels.get(id(module))
        if level is None or threading.get_ident() != self._thread:
            return
        self._level.append(level)
        before, self._cheap = self._cheap, None
        if level in WHOLE:
            # Its input may be cheap: then it is made again as well.
            self._whole = Segment(before or self._whole, is_whole=True, singly=level == Level.LEAST)

    def _left(self, module: nn.Module, *_: Any) -> None:
        if id(module) not in self._levels or threading.get_ident() != self._thread:
            return
        level, self._cheap = self._level.pop(), None
        if level in WHOLE and self._whole is not None:
            self._whole = self._whole.whole_around


def _overlap(args: Any) -> bool:
    """Whether an argument lies in the memory of the first one and is not the same tensor."""
    first, others = args[0], [leaf for leaf in leaves(list(args)) if isinstance(leaf, Tensor) and leaf is not args[0]]
    return any(each.untyped_storage() is first.untyped_storage() for each in others)


def _get(saved: Value | Kept) -> Tensor:
    return saved.get()


class _Notes:
    """What is known of the tensors that are alive, by their storages and how they lie in them."""

    def __init__(self, keep: Callable[[Tensor], Kept]) -> None:
        self._keep = keep
        # torch keeps one Python object per storage, alive as long as the storage is.
        self._values: dict[int, dict[Any, Value]] = {}
        self._users: dict[int, list[weakref.ref[Kept]]] = {}  # what would be lost if the storage were written
        self._alive: dict[int, weakref.ref[Any]] = {}

    def find(self, tensor: Tensor) -> Value | None:
        """The value that a tensor is."""
        of_storage = self._values.get(id(tensor.untyped_storage()))
        return None if of_storage is None else of_storage.get(_layout(tensor))

    def put(self, tensor: Tensor, value: Value) -> None:
        """Note that a tensor is this value."""
        self._values.setdefault(self._watch(tensor), {})[_layout(tensor)] = value

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor as it is now, for autograd or for an operator to be run again."""
        kept = self._keep(tensor)
        self._users.setdefault(self._watch(tensor), []).append(weakref.ref(kept))
        return kept

    def kept(self, value: Value, tensor: Tensor) -> None:
        """Keep the tensor of a value."""
        value.keep(self.keep(tensor))
        of_storage = self._values.get(id(tensor.untyped_storage()), {})
        of_storage.pop(_layout(tensor), None)  # or this note would keep it to the end of the pass

    def written(self, tensor: Tensor) -> None:
        """A storage is about to be written: no tensor in it will be what was noted."""
        identity = id(tensor.untyped_storage())
        self._values.pop(identity, None)
        for ref in self._users.pop(identity, ()):
            if (kept := ref()) is not None:
                kept.copy_before_write()

    def _watch(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity not in self._alive:
            known = weakref.ref(self)

            def died(_: Any) -> None:
                if (notes := known()) is not None:
                    for each in (notes._alive, notes._values, notes._users):
                        each.pop(identity, None)

            self._alive[identity] = weakref.ref(storage, died)
        return identity


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
