"""Is an error an out-of-memory, and of which kind: by its type, its code, then by texts that libraries write."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch

from adaptive_trainer.errors import AdaptiveTrainerError, LadderExhausted, OutOfMemory


class Kind(StrEnum):
    """What an error says about memory."""

    DEVICE = "device memory"
    HOST = "host memory"
    WORKER = "data worker"
    POISONED = "device unusable"
    OTHER = "not memory"


class SimulatedOutOfMemory(torch.OutOfMemoryError):
    """A simulated device is full. It counts exactly, so the same work would fail again."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What is kept of an error: plain text, nothing that holds a frame or a tensor.

    Attributes:
        kind: what it says about memory.
        type_name: class name of the error that decided the kind.
        text: first line of its message.
        exact: it came from a simulated device or a ladder that is used up, so a retry of the same work cannot help.
    """

    kind: Kind
    type_name: str
    text: str
    exact: bool

    @property
    def is_of_loading(self) -> bool:
        """Whether the host's memory has run out, here or in a data worker: fewer workers need less of it."""
        return self.kind in (Kind.HOST, Kind.WORKER)

    def fills(self, device: torch.device) -> bool:
        """Whether the memory that `device` computes in has run out."""
        return self.kind in kinds_of(device)


def kinds_of(device: torch.device) -> frozenset[Kind]:
    """What is said when the memory that a device computes in has run out, which on a CPU is the host's."""
    return frozenset({Kind.DEVICE, Kind.HOST} if device.type == "cpu" else {Kind.DEVICE})


MAX_TEXT = 400  # characters kept of a message

# Codes of the CUDA runtime, which `torch.AcceleratorError` carries.
CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
CUDA_CAPTURE_INVALIDATED = 901  # what an out-of-memory turns into while a CUDA graph is captured
# "Sticky" errors of the CUDA runtime: ECC, illegal address, launch timeout, assert, and the other faults of a kernel.
CUDA_STICKY = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719})

# What the DataLoader puts before a worker's error, which arrives here as text.
IN_DATA_LOADER = re.compile(r"^Caught (\S+) in (?:DataLoader worker process|pin memory thread)")
TRACEBACK = "Traceback (most recent call last):"
# The system has killed a worker, or its shared memory is used up: fewer workers need less of both.
WORKER_GONE = re.compile(
    r"DataLoader worker \(pid\(s\) [\d, ]+\) exited unexpectedly"
    r"|DataLoader worker \(pid \d+\) is killed by signal: (?:Killed|Bus error)"
    r"|workers are out of shared memory"
    r"|unable to (?:open|mmap|allocate|resize|write to) .*(?:</?torch_|shared memory)"
)
# Nothing can be computed on the device any more, only a new process can use it.
POISONED = re.compile(
    r"(?:CUDA|HIP)(?: driver)? error: (?:"
    r"an illegal memory access|device-side assert triggered|misaligned address|unspecified launch failure"
    r"|uncorrectable ECC error|an illegal instruction|hardware stack error|invalid program counter"
    r"|the launch timed out|operation not supported on global/shared address space|device not ready)"
    # Expandable segments after a failed mapping, and address space used up: every later allocation fails.
    r"|handles_\.at\(i\) INTERNAL ASSERT FAILED|VSZ exhaustion"
    # A communicator that ran out of memory cannot be used again.
    r"|Failed to CUDA calloc|Cuda failure (?:2 )?'out of memory'"
)
# The host's memory, in this process.
HOST = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)|\bstd::bad_alloc\b"
    r"|\bCannot allocate memory\b|^can't start new thread"  # a thread's stack is memory too
)
# An OSError that has lost its errno on the way from a data worker, and Pillow's, which has none.
HOST_OS = re.compile(r"^\[Errno 12\]|^out of memory error when ")
# The device's memory: torch's allocators, the runtimes, then CUDA's libraries, which allocate beside torch.
DEVICE = re.compile(
    r"\b(?:CUDA|HIP|XPU|MPS backend) out of memory\b"
    r"|\b(?i:CUDA|HIP|Triton)(?: driver| runtime)? (?i:error)\b[^\n]{0,200}: out of memory"
    r"|would exceed allowed memory"
    r"|CUDA ran out of memory outside PyTorch's allocator"
    r"|\b[A-Z]+_(?:STATUS_)?ALLOC_FAILED\b"
    r"|MODULE:PT_DEVMEM Allocation failed"
    # The allocator asks NVML who holds memory while it writes the message of an out-of-memory.
    r"|(?i:\bnvml)[^\n]*INTERNAL ASSERT FAILED at [^\n]*CUDACachingAllocator\b"
    r"|^Invalid buffer size: \d"  # MPS
)
# Texts that a lack of memory and a plain mistake (an unknown architecture, a bad label before) share.
AMBIGUOUS = re.compile(
    r"unable to find an engine to execute|Unable to find a valid cuDNN algorithm"
    r"|\b(?:CUDNN|CUBLAS|CUSOLVER)_STATUS_(?:NOT_SUPPORTED|NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)"
    r"|CUFFT_INTERNAL_ERROR"
    r"|previous error during capture"
)
NOT_DEVICE_MEMORY = re.compile(r"out of resource: ")  # Triton: shared memory or registers of one kernel


def describe(
    error: BaseException, *, pressure: Callable[[], bool] | None = None, handled: BaseException | None = None
) -> Failure:
    """Sort an error, what it wraps (`inner_exception`, `__cause__`, `__context__`) and the members of a group.

    The first that is about memory decides, unless one says that the device is unusable.

    Args:
        error: what was caught. `KeyboardInterrupt` and its like, and errors that this package raises on purpose, are
            never about memory, whatever they were raised in answer to.
        pressure: whether device memory is really short; asked only for texts that can have another cause. Without it
            they count as not memory.
        handled: what was being handled already where the work began, and is no part of what it wraps. It need be given
            only where work and handler are in one function: `_context` knows others by their frames.
    """
    found: Failure | None = None
    for link in _chain(error, handled) if isinstance(error, Exception) else ():
        kind = _kind(link, pressure)
        if kind is Kind.POISONED:
            return _failure(link, kind)
        if kind is not Kind.OTHER and found is None:
            found = _failure(link, kind)
    return found or _failure(error, Kind.OTHER)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory: the errors that a smaller batch, image or model can answer."""
    return describe(error).kind is Kind.DEVICE


def _failure(error: BaseException, kind: Kind) -> Failure:
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(map(str.strip, lines)) if isinstance(error, LadderExhausted) else lines[0]
    exact = isinstance(error, SimulatedOutOfMemory | LadderExhausted)
    return Failure(kind, type(error).__name__, text[:MAX_TEXT] or type(error).__name__, exact)


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """The error and everything it wraps or groups, nearest first, each once, but for what is raised on purpose."""
    queue, seen = [error], set[int]()
    while queue:
        link = queue.pop(0)
        is_on_purpose = isinstance(link, AdaptiveTrainerError) and not isinstance(link, OutOfMemory | LadderExhausted)
        if id(link) in seen or is_on_purpose:
            continue
        seen.add(id(link))
        yield link
        members = link.exceptions if isinstance(link, BaseExceptionGroup) else ()
        inner = (*members, getattr(link, "inner_exception", None), link.__cause__, _context(link))
        queue += [e for e in inner if isinstance(e, BaseException) and e is not handled]


def _context(error: BaseException) -> BaseException | None:
    """`__context__`, unless it was being handled outside the code that raised `error`."""
    # Python links every new error to the one whose handler is running, even many calls further up: a shape mismatch in
    # a training started from an `except torch.OutOfMemoryError:` block is no out-of-memory. Such an outer handler is
    # not among the frames that `error` passed through.
    context = error.__context__
    if context is None or context.__traceback__ is None or error.__traceback__ is None:
        return context
    handler = context.__traceback__.tb_frame
    entry = error.__traceback__
    while entry.tb_frame is not handler:
        if entry.tb_next is None:
            return None
        entry = entry.tb_next
    return context


def _kind(error: BaseException, pressure: Callable[[], bool] | None) -> Kind:
    text = str(error)
    worker = IN_DATA_LOADER.match(text)
    if worker:
        return _kind_in_worker(error, worker[1], text)
    if isinstance(error, OutOfMemory | LadderExhausted):
        return Kind.DEVICE
    if isinstance(error, torch.OutOfMemoryError):
        return Kind.POISONED if POISONED.search(text) else Kind.DEVICE
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and _lacks_memory(error.errno, text)):
        return Kind.HOST
    if not isinstance(error, RuntimeError):
        return Kind.OTHER  # a ValueError may quote any text
    code = getattr(error, "error_code", None) if isinstance(error, torch.AcceleratorError) else None
    if code == CUDA_OUT_OF_MEMORY:
        return Kind.DEVICE
    if code in CUDA_STICKY:
        return Kind.POISONED
    return _if_short(pressure) if code == CUDA_CAPTURE_INVALIDATED else _kind_of_text(text, pressure)


def _lacks_memory(number: int | None, text: str) -> bool:
    return number == errno.ENOMEM or (number is None and bool(HOST_OS.search(text)))


def _kind_in_worker(error: BaseException, type_name: str, text: str) -> Kind:
    # By the type that was raised in the worker: what arrives may be a RuntimeError that quotes another's text.
    if "MemoryError" in type_name:
        return Kind.WORKER
    is_same = type(error).__name__ == type_name
    quoted = _quoted(type_name, text)
    if is_same and isinstance(error, OSError):
        return Kind.WORKER if _lacks_memory(None, quoted) else Kind.OTHER
    if not (is_same and isinstance(error, RuntimeError)) and type_name != torch.AcceleratorError.__name__:
        return Kind.OTHER
    return Kind.WORKER if any(about.search(quoted) for about in (WORKER_GONE, HOST, DEVICE)) else Kind.OTHER


def _quoted(type_name: str, text: str) -> str:
    """The message behind a quoted traceback, whose lines of source may say anything."""
    end = text.rpartition(TRACEBACK)[2]
    found = re.search(rf"^\S*\b{re.escape(type_name)}: (.*)", end, re.MULTILINE | re.DOTALL)
    if found:
        return found[1]
    return "" if TRACEBACK in text else text.partition("\n")[2]


def _kind_of_text(text: str, pressure: Callable[[], bool] | None) -> Kind:
    if NOT_DEVICE_MEMORY.search(text):
        return Kind.OTHER
    groups = {WORKER_GONE: Kind.WORKER, POISONED: Kind.POISONED, HOST: Kind.HOST, DEVICE: Kind.DEVICE}
    for pattern, kind in groups.items():  # in this order: some texts are of two groups
        if pattern.search(text):
            return kind
    return _if_short(pressure) if AMBIGUOUS.search(text) else Kind.OTHER


def _if_short(pressure: Callable[[], bool] | None) -> Kind:
    return Kind.DEVICE if pressure is not None and pressure() else Kind.OTHER
