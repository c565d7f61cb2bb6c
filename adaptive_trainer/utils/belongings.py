"""What objects hold beside tensors, one within the other: generators of random numbers, attributes, containers.

All of it is found by one walk. Each update looks whether that still holds, by a comparison for each attribute of the
user's own modules.
"""

from __future__ import annotations

import argparse
import functools
import operator
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from adaptive_trainer.utils.random import is_generator, process_wide

PLAIN = (int, float, complex, str, bytes, type(None), np.generic, torch.device, torch.dtype)
LEAVES = {*PLAIN, bool, torch.Size}
OPEN = (types.SimpleNamespace, argparse.Namespace, LRScheduler)  # libraries' kinds that are looked into all the same
OPAQUE = {*sys.stdlib_module_names, "torch", "numpy"}  # whose objects are not looked into
LIBRARIES = {"torch", "torchvision", "timm"}  # whose modules hold tomorrow what they hold today
KNOWN = {*OPAQUE, *LIBRARIES, __name__.partition(".")[0]}  # whose code leaves each tensor where it lies
STANDARD = set(vars(nn.Module()))
HOOKS = {name for name in STANDARD if "hook" in name}
CONTAINERS = (dict, list, OrderedDict, defaultdict, Counter, deque, set)
CALLABLES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
MOST = 1000  # elements of a container that is looked into: more are data


def walk(
    roots: Mapping[str, Any], *, into_data: bool = False, strict: Collection[str] = ()
) -> Iterator[tuple[str, Any, bool]]:
    """Every object that the roots lead to, once: its path, itself, whether it can come to hold something else.

    Args:
        into_data: look into data sets as well.
        strict: names of roots in which containers are looked into however long they are.
    """
    waiting = [(path, value, True) for path, value in reversed(list(roots.items()))]
    known = {id(generator) for generator in process_wide()}
    alive = []  # else another object could get the address of one
    while waiting:
        path, value, changes = waiting.pop()
        if type(value) in LEAVES or isinstance(value, Tensor) or id(value) in known:
            continue
        known.add(id(value))
        alive.append(value)
        most = sys.maxsize if _root(path) in strict else MOST
        inside = _inside(value, into_data=into_data, most=most)
        if inside is not None:
            if isinstance(value, nn.Module):
                changes = _package(type(value)) not in LIBRARIES
            elif isinstance(value, CALLABLES):  # what a hook or a function writes to is the user's, not the network's
                changes = False
            yield path, value, changes
            waiting += [(f"{path}.{key}", each, changes) for key, each in reversed(inside)]


def _inside(value: Any, *, into_data: bool = False, most: int = MOST) -> list[tuple[Any, Any]] | None:
    """What an object leads to, one level deep, by name; None where it is not looked into."""
    if is_generator(value):
        return []
    if isinstance(value, nn.Module):
        own = [(key, each) for key, each in vars(value).items() if key not in STANDARD or (each and key in HOOKS)]
        return [*own, *value._modules.items()]
    if isinstance(value, Optimizer):
        return [(key, each) for key, each in vars(value).items() if key != "state"]
    if isinstance(value, dict | list | tuple | set | frozenset | deque):
        if len(value) > most:
            return None
        return list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.MethodType | types.BuiltinFunctionType):
        return [("__self__", value.__self__)]
    if isinstance(value, types.FunctionType):
        return _of_function(value) if _package(value) not in OPAQUE | LIBRARIES else None
    looked_into = is_own_kind(value) or (into_data and isinstance(value, Dataset))
    return list(_attributes(value).items()) if looked_into else None


def _root(path: str) -> str:
    return path.partition(".")[0]


def _package(kind: Any) -> str:
    return str(kind.__module__).partition(".")[0]


def is_own_kind(value: Any) -> bool:
    """Whether it is an object of the user's own kind."""
    # Libraries' can lead anywhere, data sets far.
    if isinstance(value, type | types.ModuleType | Dataset):
        return False
    return isinstance(value, OPEN) or _package(type(value)) not in OPAQUE


def _attributes(value: Any) -> dict[str, Any]:
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return slots | (vars(value) if type(value).__dictoffset__ else {})


def _slots(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        yield from (name for name, slot in vars(each).items() if isinstance(slot, types.MemberDescriptorType))


def _of_function(function: types.FunctionType) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [("defaults", function.__defaults__), ("keywords", function.__kwdefaults__)]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not yet filled
            continue
    return found


def _is_plain(value: Any) -> bool:
    return type(value) in LEAVES or (type(value) is tuple and all(type(each) in LEAVES for each in value))


def _holds_tensors(value: Any) -> bool:
    inside = list(_attributes(value).values()) if is_own_kind(value) else value
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(inside))


def _leads_to_generator(value: Any, before: Any) -> bool:
    """Whether a value is or holds a generator, and has taken the place of another."""
    if value is before or type(value) in LEAVES or isinstance(value, Tensor | nn.Module):
        return False
    return any(is_generator(each) for _, each, _ in walk({"": value}))


def _is_flat(content: Any) -> bool:
    """Whether it is a list or the like of nothing but numbers and texts, which leads nowhere however long it gets."""
    return not isinstance(content, dict) and LEAVES.issuperset(map(type, content))


def _is_bound(value: Any) -> bool:
    """Whether an object holds something only by names: its dictionary is all of it."""
    is_container = isinstance(value, dict | list | set | deque)
    return hasattr(value, "__dict__") and not is_container and not any(_slots(type(value)))


def _can_change(value: Any) -> bool:
    """Whether a value that is not put back may come to say something else."""
    kind = type(value)
    if isinstance(value, (*CALLABLES, type, types.ModuleType)):
        return False
    # What is compared by value and can be in a set promises to stay; iterators and the user's own kinds do not.
    by: Any = kind.__hash__
    return by is None or hasattr(kind, "__next__") or (is_own_kind(value) and by is object.__hash__)


def _unkept(path: str, value: Any) -> str:
    """What of an object that an update may change would not be put back, and what to do; empty where all of it is."""
    inside = [(f"{path}.{key}", each) for key, each in _inside(value, most=sys.maxsize) or []]
    if any(isinstance(each, Tensor) for _, each in inside):
        return _in_buffers(path, value)
    # Those that are looked into come by themselves.
    alone = [(name, each) for name, each in inside if _inside(each, most=sys.maxsize) is None]
    if not (type(value) in CONTAINERS or is_generator(value) or _is_bound(value)):
        alone.append((path, value))
    for name, each in alone:
        if type(each) not in LEAVES and _can_change(each):
            return f"{name}, a {type(each).__name__}; keep its values in a list, a dictionary, or buffers of a module"
    return ""


def _in_buffers(path: str, value: Any) -> str:
    kind = type(value).__name__
    return f"the tensors of {kind}; make them buffers of a torch.nn.Module, and name that in `also` (found as {path})"


class _Holder:
    """The attributes of an object, or a container: what it leads to, and what of it can be put back.

    Args:
        whole: put back all but tensors; else which generators it holds.
    """

    def __init__(self, content: Any, *, whole: bool) -> None:
        self.content = content
        self.whole = whole
        self.is_flat = _is_flat(content)
        values, self.kinds = self._values()
        names = list(content) if isinstance(content, dict) else list(range(len(values)))
        self.plain = [n for n, value in enumerate(values) if _is_plain(value) or is_generator(value)]
        self.tuples = [n for n in self.plain if self.kinds[n] is tuple]  # each may come to hold something else
        # Nothing is held on to that holds tensors, whose memory the update needs.
        self.links = [
            (n, value)
            for n, (name, value) in enumerate(zip(names, values, strict=True))
            if not (name in STANDARD or _is_plain(value) or isinstance(value, nn.Module | Tensor))
            and (is_generator(value) or not _holds_tensors(value))
        ]

    def _values(self) -> tuple[list[Any], tuple[type, ...]]:
        values = list(self.content.values() if isinstance(self.content, dict) else self.content)
        return values, tuple(map(type, values))

    def keep(self) -> bool:
        """Note what is in it; False where it does not lead where it did when it was first looked at."""
        if self.is_flat:
            self.names = tuple(self.content)
            return _is_flat(self.content)
        values, kinds = self._values()
        if kinds != self.kinds or not all(values[n] is value for n, value in self.links):
            return False
        if not all(_is_plain(values[n]) for n in self.tuples):
            return False
        self.names = tuple(self.content)  # of a list: what is in it
        self.kept = [values[n] for n in self.plain]
        return True

    def put_back(self) -> None:
        """What it held when it was noted, but for tensors and what holds them."""
        content = self.content
        if not isinstance(content, dict):
            if self.whole:
                content.clear()
                (content.update if isinstance(content, set) else content.extend)(self.names)
            return
        before = {self.names[n]: value for n, value in zip(self.plain, self.kept, strict=True)}
        before |= {self.names[n]: value for n, value in self.links}
        changed = [name for name in content if self.whole or _leads_to_generator(content[name], before.get(name))]
        for name in set(changed).difference(self.names):
            del content[name]
        for name in before if self.whole else [name for name in changed if name in before]:
            content[name] = before[name]  # `update` of a Counter would add


def _modules(value: Any) -> Iterator[nn.Module]:
    yield from value.modules() if isinstance(value, nn.Module) else ()


class Belongings:
    """The generators that some objects own, and the plain attributes of some of these objects.

    Attributes:
        generators: by the path that leads to each.
        has_own_code: something else runs than what torch, timm, torchvision and this package bring.
        unkept: what of the strict roots would not be put back, each as text.

    Args:
        roots: the objects, by name; `whole` names those whose plain attributes are put back too.
        strict: names of those of `whole` of which everything that may change must be put back.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        *,
        whole: Collection[str] = (),
        into_data: bool = False,
        strict: Collection[str] = (),
    ) -> None:
        self.roots = roots
        self.whole = whole
        self.strict = strict
        self.into_data = into_data
        self._look()

    def _look(self) -> None:
        self.generators: dict[str, Any] = {}
        self.has_own_code = False
        self._sizes: list[dict[str, Any]] = []  # of libraries' modules too, to which other code may give something
        self._holders: list[_Holder] = []
        self.unkept: list[str] = []
        # Modules whose parameters and buffers somebody else puts back.
        bound = {id(m) for name in self.strict for each in self.roots[name] for m in _modules(each)}
        for path, value, changes in walk(self.roots, into_data=self.into_data, strict=self.strict):
            if is_generator(value):
                self.generators[path] = value
            if _package(value if isinstance(value, types.FunctionType) else type(value)) not in KNOWN:
                self.has_own_code = True
            if isinstance(value, nn.Module):
                self._sizes += [vars(value), value._modules]
            if _root(path) in self.strict:
                if isinstance(value, nn.Module) and id(value) not in bound:
                    self.unkept.append(_in_buffers(path, value))
                elif changes and (text := _unkept(path, value)):
                    self.unkept.append(text)
            # A network's plain attributes stay: one that fails in its seventh call would fail in it for ever.
            content = value if type(value) in CONTAINERS else getattr(value, "__dict__", None)
            if not changes or not isinstance(content, CONTAINERS) or is_generator(value):
                continue
            if content is not value or not _holds_tensors(value):
                self._holders.append(_Holder(content, whole=_root(path) in self.whole))
        self._size = self._count()

    def _count(self) -> int:
        return sum(map(len, self._sizes))

    def keep(self) -> bool:
        """Note what there is; whether the generators are the same ones as before."""
        is_sure = not self.has_own_code or self._size == self._count()
        if is_sure and all(holder.keep() for holder in self._holders):
            return True
        before = list(self.generators.values())
        self._look()
        for holder in self._holders:
            holder.keep()
        now = list(self.generators.values())
        return len(now) == len(before) and all(map(operator.is_, now, before))

    def put_back(self) -> None:
        """Bind again what was bound when it was noted: no state of a generator."""
        for holder in self._holders:
            holder.put_back()
