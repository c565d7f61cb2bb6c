"""What memory is used: printing, clearing, monitoring."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.memory.processes import GpuProcess, processes_on
from adaptive_trainer.memory.usage import (
    Usage,
    clear_gpu_memory,
    describe_users,
    format_bytes,
    monitor_gpu_memory,
    print_gpu_memory,
    reset_peaks,
    snapshot,
)

CPU = torch.device("cpu")
MiB = 2**20
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")


@pytest.fixture
def card() -> Iterator[Capacity]:
    with limited(CPU, "64MiB") as capacity:
        yield capacity


def filled(capacity: Capacity, mib: int) -> torch.Tensor:
    with capacity.device_work():
        return torch.zeros(mib * MiB, dtype=torch.uint8)


def test_format_bytes() -> None:
    assert format_bytes(5600 * MiB) == "5600 MiB"
    assert format_bytes(512 * 1024) == "512 KiB"
    assert format_bytes(512) == "512 bytes"
    assert format_bytes(-12 * MiB) == "-12 MiB"
    assert format_bytes(0) == "0 bytes"
    assert format_bytes(None) == "unknown"


def test_print_shows_the_simulated_card(card: Capacity) -> None:
    kept = filled(card, 16)
    out = io.StringIO()
    print_gpu_memory(out)
    line = out.getvalue().splitlines()[-1]
    assert line == (
        "simulated card: total 64 MiB, allocated 16 MiB (25 %), reserved 16 MiB (25 %), "
        "free on the device 48 MiB (75 %)"
    )
    assert len(kept) == 16 * MiB


@no_gpu
def test_print_without_any_card(capsys: pytest.CaptureFixture[str]) -> None:
    print_gpu_memory()
    assert "no CUDA GPU" in capsys.readouterr().out
    assert snapshot(CPU) == Usage()
    reset_peaks(CPU)


def test_clear_gives_back_what_nothing_refers_to(card: Capacity, capsys: pytest.CaptureFixture[str]) -> None:
    kept, dropped = filled(card, 16), filled(card, 32)
    del dropped
    assert clear_gpu_memory() == 32 * MiB
    assert capsys.readouterr().out == "freed 32 MiB; 16 MiB are still in use\n"
    del kept
    assert clear_gpu_memory() == 16 * MiB
    assert clear_gpu_memory() == 0


@no_gpu
def test_monitor_as_context_manager(card: Capacity) -> None:
    kept, out = filled(card, 4), io.StringIO()
    with monitor_gpu_memory("step", file=out) as seen:
        filled(card, 32)
        more = filled(card, 12)
    assert (seen.before, seen.peak, seen.after) == (4 * MiB, 36 * MiB, 16 * MiB)
    assert out.getvalue() == "step: before 4096 KiB, peak 36 MiB, after 16 MiB\n"
    assert len(kept) + len(more) == 16 * MiB


@no_gpu
def test_monitor_as_decorator(card: Capacity, capsys: pytest.CaptureFixture[str]) -> None:
    @monitor_gpu_memory
    def plain(mib: int) -> int:
        return len(filled(card, mib))

    @monitor_gpu_memory("labelled")
    def labelled(mib: int) -> int:
        return len(filled(card, mib))

    @monitor_gpu_memory()
    def called() -> None:
        raise KeyError("goes on")

    assert plain(16) == 16 * MiB
    assert plain.__name__ == "plain"
    assert labelled(20) == 20 * MiB
    with pytest.raises(KeyError, match="goes on"):
        called()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("plain: before 0 bytes, peak 16 MiB, after 0 bytes")
    assert second == "labelled: before 0 bytes, peak 20 MiB, after 0 bytes"
    assert "called: before" in third


@no_gpu
def test_nested_monitors_and_resets_keep_the_outer_peak(card: Capacity) -> None:
    out = io.StringIO()
    with monitor_gpu_memory("outer", file=out) as outer:
        filled(card, 48)
        with monitor_gpu_memory("inner", file=out) as inner:
            filled(card, 24)
        card.reset_peaks()
    assert (inner.peak, outer.peak) == (24 * MiB, 48 * MiB)


@no_gpu
def test_users_without_a_gpu() -> None:
    assert isinstance(processes_on(torch.device("cuda", 0)), str), "why they are not known"
    assert describe_users(CPU) == "no other process uses this device's memory"


def test_what_nvml_says_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as bytes too, and of a process that NVML cannot name the system's; NVML is closed again, whatever fails."""

    class Unknown(Exception):
        pass

    def named(pid: int) -> str | bytes:
        names: dict[int, str | bytes] = {1: "/usr/bin/one", 2: b"/usr/bin/tw\xff"}
        if pid not in names:
            raise Unknown("no such process")
        return names[pid]

    def running(handle: str) -> list[SimpleNamespace]:
        if handle == "GPU-broken":
            raise Unknown("lost")
        return [SimpleNamespace(pid=pid, usedGpuMemory=pid or None) for pid in (0, 1, 2, os.getpid())]

    def drawing(handle: str) -> list[SimpleNamespace]:
        if handle == "GPU-slice":
            raise Unknown("not supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=pid) for pid in (1, 2**30)]

    opened: list[int] = []
    nvml = SimpleNamespace(
        NVMLError=Unknown,
        nvmlInit=lambda: opened.append(1),
        nvmlShutdown=opened.pop,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetComputeRunningProcesses=running,
        nvmlDeviceGetGraphicsRunningProcesses=drawing,
        nvmlSystemGetProcessName=named,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    uuids = iter(["whole", "slice", "broken"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(uuids)))
    device = torch.device("cuda", 0)
    users = processes_on(device)
    comm = Path("/proc/self/comm")
    mine = comm.read_text().strip() if comm.exists() else "unknown program"
    assert users == [
        GpuProcess(2**30, "unknown program", 2**30),
        GpuProcess(os.getpid(), mine, os.getpid()),
        GpuProcess(2, "tw\N{REPLACEMENT CHARACTER}", 2),
        GpuProcess(1, "one", 1),
        GpuProcess(0, "unknown program", None),
    ]
    assert {user.pid for user in processes_on(device) if isinstance(user, GpuProcess)} == {0, 1, 2, os.getpid()}
    assert processes_on(device) == "NVML: lost"
    assert opened == []


@pytest.mark.gpu
def test_on_cuda() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    clear_gpu_memory()
    before = torch.cuda.memory_allocated(device)
    out = io.StringIO()
    with monitor_gpu_memory("cuda", file=out) as seen:
        tensor = torch.zeros(64 * MiB, dtype=torch.uint8, device=device)
        print_gpu_memory(out)
        del tensor
    assert seen.peak - seen.before == 64 * MiB
    assert seen.after == before
    text = out.getvalue()
    assert torch.cuda.get_device_name(device) in text
    assert "free on the device" in text
    assert "outside this process's allocator" in text
    assert clear_gpu_memory() >= 64 * MiB
    users = processes_on(device)
    assert isinstance(users, list), users
    assert all(isinstance(user, GpuProcess) for user in users)
    assert str(os.getpid()) not in describe_users(device)
