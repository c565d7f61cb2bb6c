"""Which kind an error is; freeing what a failed step held."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from adaptive_trainer import oom
from adaptive_trainer.errors import ConfigError, Interrupted, OutOfMemory
from adaptive_trainer.oom import Kind, describe
from adaptive_trainer.oom.classify import MAX_TEXT

BOILERPLATE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)

ASSERT, ALLOCATOR = "INTERNAL ASSERT FAILED at", "c10/cuda/CUDACachingAllocator.cpp"

TEXTS = [
    ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 5.00 GiB", Kind.DEVICE),
    ("CUDA error: out of memory" + BOILERPLATE, Kind.DEVICE),
    ("CUDA driver error: out of memory", Kind.DEVICE),
    ("HIP out of memory. Tried to allocate 2.00 GiB", Kind.DEVICE),
    ("HIP error: out of memory", Kind.DEVICE),
    ("XPU out of memory. Tried to allocate 2.00 GiB", Kind.DEVICE),
    ("MPS backend out of memory (MPS allocated: 17.4 GiB, other allocations: 1 GiB)", Kind.DEVICE),
    ("Invalid buffer size: 24.00 GiB", Kind.DEVICE),
    ("Allocation on device 0 would exceed allowed memory. (out of memory)", Kind.DEVICE),
    ("CUDA ran out of memory outside PyTorch's allocator. cuDNN may need additional device memory", Kind.DEVICE),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Kind.DEVICE),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", Kind.DEVICE),
    ("cuFFT error: CUFFT_ALLOC_FAILED", Kind.DEVICE),
    ("CUDA error: SPARSE_STATUS_ALLOC_FAILED", Kind.DEVICE),
    ('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":838', Kind.DEVICE),
    (f'NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() {ASSERT} "/pytorch/{ALLOCATOR}":963, please', Kind.DEVICE),
    (f'NVML_SUCCESS == nvmlDeviceGetHandleByPciBusId_v2_( id, &device) {ASSERT} "{ALLOCATOR}":969', Kind.DEVICE),
    (f'NVML_SUCCESS == r {ASSERT} "C:\\\\b\\\\c10\\\\cuda\\\\CUDACachingAllocator.cpp":9', Kind.DEVICE),
    (f'NVML_SUCCESS == nvmlInit_v2_() {ASSERT} "/pytorch/c10/cuda/driver_api.cpp":40, please', Kind.OTHER),
    (f'NVML_SUCCESS == r {ASSERT} "/pytorch/torch/csrc/distributed/c10d/NVLink.cpp":9', Kind.OTHER),
    (f'block->allocated {ASSERT} "/pytorch/{ALLOCATOR}":99', Kind.OTHER),
    ("can't start new thread", Kind.HOST),
    ("unable to mmap 1024 bytes from file </data/x.bin>: Cannot allocate memory (12)", Kind.HOST),
    ("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::40960", Kind.DEVICE),
    ("CUDA error: an illegal memory access was encountered" + BOILERPLATE, Kind.POISONED),
    ("CUDA error: device-side assert triggered" + BOILERPLATE, Kind.POISONED),
    ("CUDA error: misaligned address", Kind.POISONED),
    ("CUDA error: unspecified launch failure", Kind.POISONED),
    ("CUDA error: uncorrectable ECC error encountered", Kind.POISONED),
    ("CUDA driver error: device not ready", Kind.POISONED),
    ('!handles_.at(i) INTERNAL ASSERT FAILED at "c10/cuda/CUDACachingAllocator.cpp":582', Kind.POISONED),
    (
        "NCCL error: ncclUnhandledCudaError: Call to CUDA failed.\nLast error:\nFailed to CUDA calloc async",
        Kind.POISONED,
    ),
    ("NCCL error\nLast error:\nCuda failure 2 'out of memory'", Kind.POISONED),
    ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried", Kind.HOST),
    ("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.", Kind.HOST),
    ("DataLoader worker (pid(s) 4, 5) exited unexpectedly", Kind.WORKER),
    ("DataLoader worker (pid 4) is killed by signal: Killed. ", Kind.WORKER),
    ("DataLoader worker (pid 4) is killed by signal: Bus error. It is possible that dataloader's workers", Kind.WORKER),
    ("unable to mmap 1024 bytes from file </torch_12_3>: Cannot allocate memory (12)", Kind.WORKER),
    ("unable to write to file </torch_12_3>: No space left on device (28)", Kind.WORKER),
    ("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback", Kind.WORKER),
    ("Caught OutOfMemoryError in DataLoader worker process 0.\nOriginal Traceback", Kind.WORKER),
    ("Caught AcceleratorError in pin memory thread for device 0.\nCUDA error: out of memory", Kind.WORKER),
    ("Caught ValueError in DataLoader worker process 0.\nValueError: bad image", Kind.OTHER),
    ("DataLoader worker (pid 4) is killed by signal: Segmentation fault. ", Kind.OTHER),
    ("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x2)", Kind.OTHER),
    ("index 9 is out of memory bank with size 4", Kind.OTHER),
    ("Storage size calculation overflowed with sizes=[1]", Kind.OTHER),
    ("nonzero is not supported for tensors with more than INT_MAX elements", Kind.OTHER),
    ("No valid triton configs. OutOfMemoryError: out of resource: shared memory, Required: 2, limit: 1", Kind.OTHER),
]


@pytest.mark.parametrize(("text", "kind"), TEXTS)
def test_known_texts(text: str, kind: Kind) -> None:
    assert describe(RuntimeError(text)).kind is kind
    assert describe(RuntimeError(text), pressure=lambda: True).kind is kind
    assert oom.is_out_of_memory(RuntimeError(text)) is (kind is Kind.DEVICE)


@pytest.mark.parametrize("text", [text for text, _ in TEXTS if not text.startswith("Caught")])
def test_a_value_error_may_say_anything(text: str) -> None:
    assert describe(ValueError(text), pressure=lambda: True).kind is Kind.OTHER


@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR",
        "CUDA error: operation failed due to a previous error during capture",
    ],
)
def test_ambiguous_texts_count_only_when_memory_is_short(text: str) -> None:
    assert describe(RuntimeError(text)).kind is Kind.OTHER
    assert describe(RuntimeError(text), pressure=lambda: False).kind is Kind.OTHER
    assert describe(RuntimeError(text), pressure=lambda: True).kind is Kind.DEVICE


def test_types() -> None:
    assert describe(torch.OutOfMemoryError("anything")).kind is Kind.DEVICE
    assert describe(oom.SimulatedOutOfMemory("full")) == oom.Failure(
        Kind.DEVICE, "SimulatedOutOfMemory", "full", exact=True
    )
    assert describe(OutOfMemory("full", phase="forward")).kind is Kind.DEVICE
    assert describe(MemoryError()).kind is Kind.HOST
    assert describe(OSError(errno.ENOMEM, "Cannot allocate memory")).kind is Kind.HOST
    assert describe(OSError(errno.ENOENT, "No such file")).kind is Kind.OTHER


@pytest.mark.parametrize(
    ("code", "kind"),
    [(2, Kind.DEVICE), (214, Kind.POISONED), (700, Kind.POISONED), (710, Kind.POISONED), (98, Kind.OTHER)],
)
def test_code_of_an_accelerator_error(code: int, kind: Kind) -> None:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    assert describe(error).kind is kind


def test_capture_invalidated_by_an_out_of_memory() -> None:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = 901  # type: ignore[attr-defined]
    assert describe(error).kind is Kind.OTHER
    assert describe(error, pressure=lambda: True).kind is Kind.DEVICE


def test_real_mistakes_are_not_memory() -> None:
    def bad_label() -> None:
        torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 7]))

    mistakes: list[Callable[[], object]] = [
        lambda: torch.zeros(2, 3) @ torch.zeros(2, 3),
        bad_label,
        lambda: torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 3)}),
        lambda: dict[str, int]()["key"],
    ]
    for mistake in mistakes:
        with pytest.raises(Exception) as caught:
            mistake()
        failure = describe(caught.value, pressure=lambda: True)
        assert failure.kind is Kind.OTHER
        assert failure.type_name == type(caught.value).__name__


def raised(make: Callable[[], object]) -> BaseException:
    try:
        make()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_wrapped_with_from() -> None:
    def wrap() -> None:
        try:
            out_of_memory()
        except RuntimeError as error:
            raise ValueError("step failed") from error

    failure = describe(raised(wrap))
    assert (failure.kind, failure.type_name) == (Kind.DEVICE, "OutOfMemoryError")


def test_wrapped_from_none() -> None:
    def wrap() -> None:
        try:
            out_of_memory()
        except RuntimeError:
            raise ValueError("step failed") from None

    assert describe(raised(wrap)).kind is Kind.DEVICE


def test_inner_exception_of_a_compiler() -> None:
    error = RuntimeError("backend='inductor' raised")
    error.inner_exception = torch.OutOfMemoryError("full")  # type: ignore[attr-defined]
    assert describe(error).kind is Kind.DEVICE


def test_a_chain_that_bites_its_tail() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert describe(first).kind is Kind.OTHER


def test_the_nearest_link_decides() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    error.__cause__ = torch.OutOfMemoryError("full")
    assert describe(error).kind is Kind.POISONED


def test_a_mistake_inside_a_callers_handler_is_not_memory() -> None:
    def train() -> Kind | None:
        try:
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        except RuntimeError as error:
            linked = isinstance(error.__context__, torch.OutOfMemoryError)
            return describe(error).kind if linked else None
        return None

    try:
        out_of_memory()
    except RuntimeError:
        assert train() is Kind.OTHER


def test_a_mistake_in_the_function_of_the_handler_is_not_memory_when_the_handled_error_is_named() -> None:
    handled = raised(out_of_memory)

    def mistake() -> None:
        try:
            raise handled
        except RuntimeError:
            torch.zeros(2, 3) @ torch.zeros(2, 3)

    error = raised(mistake)
    assert describe(error).kind is Kind.DEVICE  # no frame tells them apart
    assert describe(error, handled=handled).kind is Kind.OTHER
    assert describe(handled, handled=handled).kind is Kind.DEVICE


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), Interrupted("stop"), ConfigError("bad")])
def test_stopping_during_a_recovery_stays_what_it_is(error: BaseException) -> None:
    error.__context__ = torch.OutOfMemoryError("full")
    assert describe(error).kind is Kind.OTHER


def test_text_is_the_first_line_cut() -> None:
    assert describe(RuntimeError("\nfirst\nsecond")).text == "first"
    assert describe(RuntimeError()).text == "RuntimeError"
    assert len(describe(RuntimeError("x" * 10_000)).text) == MAX_TEXT


def test_the_cpu_allocator_itself() -> None:
    error = raised(lambda: torch.empty(2**50, dtype=torch.uint8))
    assert describe(error).kind is Kind.HOST


class Broken(Dataset[torch.Tensor]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        raise self.error  # not RuntimeError: CUDA out of memory


class Told(ValueError):
    """Cannot be made of a message alone, so that it comes from a worker as a RuntimeError."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("broken"), Kind.WORKER),
        (MemoryError(), Kind.WORKER),
        (torch.OutOfMemoryError("broken"), Kind.WORKER),
        (RuntimeError(FULL), Kind.WORKER),
        (RuntimeError("std::bad_alloc"), Kind.WORKER),
        (RuntimeError("\nCUDA error: out of memory" + BOILERPLATE), Kind.WORKER),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Kind.WORKER),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "a.jpg"), Kind.WORKER),
        (OSError("out of memory error when reading image file"), Kind.WORKER),
        (OSError(errno.ENOENT, "Cannot allocate memory"), Kind.OTHER),
        (RuntimeError("broken"), Kind.OTHER),
        (RuntimeError(), Kind.OTHER),
        (ValueError("broken"), Kind.OTHER),
        (ValueError(FULL), Kind.OTHER),
        (KeyError(FULL), Kind.OTHER),
        (Told("a.jpg", "std::bad_alloc"), Kind.OTHER),
        (AssertionError("DataLoader worker (pid(s) 4, 5) exited unexpectedly"), Kind.OTHER),
    ],
    ids=repr,
)
def test_a_real_data_worker(error: Exception, kind: Kind) -> None:
    samples: Any = iter(DataLoader(Broken(error), num_workers=1))
    found = raised(lambda: next(samples))
    samples._shutdown_workers()  # left to the garbage collector, it is waited for, for five seconds each
    assert describe(found, pressure=lambda: True).kind is kind


GROUPS = [
    (ExceptionGroup("tasks", [torch.OutOfMemoryError("full")]), Kind.DEVICE),
    (ExceptionGroup("tasks", [ValueError("gone"), ExceptionGroup("more", [RuntimeError(FULL)])]), Kind.DEVICE),
    (ExceptionGroup("tasks", [MemoryError()]), Kind.HOST),
    (ExceptionGroup(FULL, [ValueError(FULL)]), Kind.OTHER),
    (ExceptionGroup("tasks", [RuntimeError(FULL), RuntimeError("CUDA error: misaligned address")]), Kind.POISONED),
    (BaseExceptionGroup("tasks", [torch.OutOfMemoryError("full"), KeyboardInterrupt()]), Kind.OTHER),
    (ExceptionGroup("tasks", [OutOfMemory("full", phase="forward")]), Kind.DEVICE),
    (ExceptionGroup("tasks", [ConfigError("bad")]), Kind.OTHER),
]


@pytest.mark.parametrize(("group", "kind"), GROUPS)
def test_groups(group: BaseExceptionGroup[BaseException], kind: Kind) -> None:
    for member in group.exceptions:
        if isinstance(member, ConfigError):
            member.__context__ = torch.OutOfMemoryError("full")
    assert describe(group).kind is kind
    outer = RuntimeError("step failed")
    outer.__cause__ = group
    if isinstance(group, Exception):
        assert describe(outer).kind is kind


def test_probe_and_release_on_a_cpu() -> None:
    class Node:
        pass

    node = Node()
    node.me = node  # type: ignore[attr-defined]
    gone = weakref.ref(node)
    gc.disable()
    try:
        del node
        assert gone() is not None
        oom.release(torch.device("cpu"))
    finally:
        gc.enable()
    assert gone() is None
    assert oom.probe(torch.device("cpu"))


def test_forget_traceback_outside_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    error = raised(out_of_memory)
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
    oom.forget_traceback()
    assert sys.last_value is None
    assert sys.last_traceback is None


@pytest.mark.gpu
def test_a_real_out_of_memory_on_cuda() -> None:
    device = torch.device("cuda", 0)
    oom.release(device)
    before = torch.cuda.memory_allocated(device)
    _, total = torch.cuda.mem_get_info(device)

    def overfill() -> None:
        kept = [torch.empty(total // 4, dtype=torch.uint8, device=device) for _ in range(9)]
        raise AssertionError(f"{len(kept)} quarters fit")

    failure = describe(raised(overfill))
    assert (failure.kind, failure.exact) == (Kind.DEVICE, False)
    assert oom.probe(device)
    oom.release(device)
    assert torch.cuda.memory_allocated(device) == before


BAD_LABEL = """
import torch
from adaptive_trainer import oom
device = torch.device("cuda", 0)
try:
    torch.nn.functional.cross_entropy(torch.zeros(2, 3, device=device), torch.tensor([0, 7], device=device))
    torch.cuda.synchronize()
except RuntimeError as error:
    failure = oom.describe(error, pressure=lambda: True)
print(failure.kind, oom.probe(device), sep=", ")
"""


@pytest.mark.gpu
def test_a_real_device_side_assert_leaves_the_device_unusable() -> None:
    ran = subprocess.run([sys.executable, "-c", BAD_LABEL], capture_output=True, text=True, check=False)
    assert ran.stdout == "device unusable, False\n", ran.stderr


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error (x.cu:3): out of memory",
        "cuda runtime error (2) : out of memory",
    ],
)
def test_other_spellings(text: str) -> None:
    assert oom.describe(RuntimeError(text)).kind is Kind.DEVICE


def test_a_full_card_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use of a kernel loads it, which fails on a full card."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    monkeypatch.setattr(torch, "ones", full)
    assert oom.probe(torch.device("cuda", 0))
