"""`task=doctor`: each check on the facts of machines that are not here, and what is seen of this one."""

from __future__ import annotations

import logging
import math
import os
import resource
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_trainer.cli import doctor
from adaptive_trainer.cli.doctor import CHECKS, Finding, findings, has_kernels, run_doctor
from adaptive_trainer.cli.machine import DRIVER, Card, Machine, Place, driver_version, fp16_error, observe, place
from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.errors import ConfigError, UserError
from adaptive_trainer.memory.processes import GpuProcess
from adaptive_trainer.utils.screen import _broken

MiB = 2**20
CPU = torch.device("cpu")
NEW = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CARD = Card("NVIDIA GeForce RTX 2060", (7, 5), 6144 * MiB, 5600 * MiB, fp16_error=0.001)
HEALTHY = Machine(
    system="linux",
    torch="2.14.1+cu128",
    cuda="12.8",
    architectures=NEW,
    driver="580.65.06",
    card=CARD,
    output=Place(Path("/home/me/outputs"), 2**40),
    cache=Place(Path("/home/me/.cache"), 2**40),
    shared=8192 * MiB,
    open_files=1024,
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")


def card(**facts: Any) -> Machine:
    return replace(HEALTHY, card=replace(CARD, **facts))


# The facts, the settings, whether training is impossible, and what is said.
CASES = {
    "no driver": (
        replace(HEALTHY, driver=None, card=None),
        [],
        False,
        ["no NVIDIA card is seen", "nvidia.com/drivers", "card=rtx2060"],
    ),
    "no driver, a card wanted": (replace(HEALTHY, driver=None, card=None), ["device=cuda:1"], True, ["no NVIDIA card"]),
    "wheel for the CPU": (
        replace(HEALTHY, torch="2.14.1+cpu", cuda=None, card=None, architectures=()),
        [],
        True,
        ["2.14.1+cpu is built for the CPU alone", "pip install --force-reinstall torch", "whl/cu128"],
    ),
    "driver too old": (
        replace(HEALTHY, card=None, refused="The NVIDIA driver on your system is too old", driver="470.0"),
        [],
        True,
        ["takes no card: The NVIDIA driver on your system is too old", "older than CUDA 12.8"],
    ),
    "hidden": (
        replace(HEALTHY, card=None, refused="No CUDA GPUs are available", environment={"CUDA_VISIBLE_DEVICES": ""}),
        [],
        True,
        ["CUDA_VISIBLE_DEVICES= may hide it: 'unset CUDA_VISIBLE_DEVICES'"],
    ),
    "no memory for CUDA itself": (
        replace(HEALTHY, card=None, refused="CUDA error: out of memory"),
        [],
        True,
        ["the card is full: not even CUDA starts on it (CUDA error: out of memory)", "nvidia-smi"],
    ),
    "GTX 1080 Ti": (card(name="GTX 1080 Ti", capability=(6, 1)), [], True, ["no kernels for", "(6.1)", "whl/cu126"]),
    "RTX 5090, older wheel": (
        replace(card(name="RTX 5090", capability=(12, 0)), architectures=("sm_80", "sm_90")),
        [],
        True,
        ["no kernels for RTX 5090 (12.0); it has sm_80, sm_90", "whl/cu128"],
    ),
    "GTX 1650": (
        card(name="NVIDIA GeForce GTX 1650"),
        [],
        False,
        ["GTX 1650", "NaN", "ladder=exact", "precision=fp32"],
    ),
    "fp16 wrong": (card(fp16_error=math.inf), [], False, ["RTX 2060 computes a small convolution in fp16 wrongly"]),
    "fp16 wrong and wanted": (card(fp16_error=math.inf), ["trainer.precision=fp16"], True, ["in fp16 wrongly"]),
    "others on the card": (
        card(
            users=[
                GpuProcess(11, "firefox", 300 * MiB),
                GpuProcess(12, "Xorg", 80 * MiB),
                GpuProcess(13, "python3.11", 2000 * MiB),
                GpuProcess(14, "blender", None),
            ]
        ),
        [],
        False,
        [
            "a browser holds memory of the card: firefox (pid 11, 300 MiB)",
            "hardware acceleration",
            "the desktop holds memory of the card: Xorg (pid 12, 80 MiB)",
            "multi-user.target",
            "a Python program holds memory of the card: python3.11 (pid 13, 2000 MiB)",
            "kernel is shut down",
            "another program holds memory of the card: blender (pid 14, unknown)",
            "5600 MiB of 6144 MiB are left",
        ],
    ),
    "taken by nobody": (
        card(free=1000 * MiB),
        [],
        False,
        ["more than half of the card is taken", "restart the machine"],
    ),
    "not known by whom": (card(free=1000 * MiB, users="NVML: no rights"), [], False, ["not known: NVML: no rights"]),
    "full card": (
        card(free=20 * MiB, users=[GpuProcess(1, "game", 6000 * MiB)]),
        [],
        True,
        ["the card is full: 20 MiB"],
    ),
    "WSL": (
        replace(HEALTHY, system="wsl", driver="566.36"),
        [],
        False,
        ["'CUDA - Sysmem Fallback Policy'", "Global Settings", "'Shared GPU memory'", "memory.limit=5040MiB"],
    ),
    "Windows": (
        replace(HEALTHY, system="windows", driver=""),
        [],
        False,
        ["python.exe", "'Prefer No Sysmem Fallback'"],
    ),
    "another allocator": (
        replace(HEALTHY, environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_LAUNCH_BLOCKING": "1"}),
        [],
        False,
        ["PYTORCH_ALLOC_CONF=expandable_segments:True", "unset PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING=1"],
    ),
    "full /dev/shm": (
        replace(HEALTHY, shared=64 * MiB),
        ["data.num_workers=4"],
        False,
        ["/dev/shm has 64 MiB free, and 4 data workers need about 110 MiB", "data.num_workers=2;", "--shm-size"],
    ),
    "few files": (
        replace(HEALTHY, open_files=256),
        ["data.num_workers=4"],
        False,
        ["may open 256 files", "ulimit -n 4096"],
    ),
    "few addresses": (replace(HEALTHY, address_space=8192 * MiB), [], False, ["8192 MiB of addresses", "ulimit -v"]),
    "little room": (
        replace(HEALTHY, output=Place(Path("/small"), 500 * MiB)),
        [],
        False,
        ["'/small': 500 MiB are free", "output_dir=FOLDER"],
    ),
    "full disk": (replace(HEALTHY, output=Place(Path("/full"), 0)), [], True, ["'/full': 0 bytes are free"]),
    "no rights": (
        replace(HEALTHY, output=Place(Path("/root"), 2**40, "Permission denied")),
        [],
        True,
        ["no file can be made in it (Permission denied)"],
    ),
    "no cache": (replace(HEALTHY, cache=None), [], False, ["no cache folder", "export ADAPTIVE_TRAINER_CACHE=FOLDER"]),
    "cache of another": (
        replace(HEALTHY, cache=Place(Path("/theirs"), 2**40, "Permission denied")),
        [],
        False,
        ["cache folder '/theirs': Permission denied"],
    ),
}


@cache
def settings(*overrides: str) -> Config:
    return typed(compose_config(list(overrides)))


@pytest.mark.parametrize("case", CASES)
def test_what_is_found(case: str) -> None:
    machine, overrides, stops, said = CASES[case]
    found = findings(machine, settings(*overrides))
    text = "\n".join(map(str, found))
    assert [part for part in said if part not in text] == []
    assert any(each.stops for each in found) == stops
    assert all(each.what and each.why and each.do for each in found)


@pytest.mark.parametrize(
    "machine",
    [
        HEALTHY,
        replace(HEALTHY, system="windows", driver="531.18", open_files=None, shared=None),  # before drivers lent memory
        replace(HEALTHY, environment={"PYTORCH_ALLOC_CONF": "", "CUDA_LAUNCH_BLOCKING": "0"}, shared=0),  # no workers
        card(free=2000 * MiB, users=[], total=3000 * MiB),
    ],
)
def test_a_healthy_machine(machine: Machine) -> None:
    assert findings(machine, settings()) == []


def test_the_cpu_needs_no_card() -> None:
    assert findings(replace(HEALTHY, driver=None, card=None), settings("device=cpu")) == []


def test_each_check_is_in_a_case() -> None:
    finding = {each for each in CHECKS for machine, own, *_ in CASES.values() if list(each(machine, settings(*own)))}
    assert finding == set(CHECKS)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_lines_fit(columns: int) -> None:
    """But for what is copied as a whole, which has a line of its own."""
    texts = [str(each) for machine, own, *_ in CASES.values() for each in findings(machine, settings(*own))]
    lines = [part for text in texts for line in text.splitlines() for part in _broken(line, columns).splitlines()]
    long = [line.strip() for line in lines if len(line) > columns]
    assert [line for line in long if not line.startswith("'pip install")] == []
    assert bool(long) == (columns < 120)


@pytest.mark.parametrize(
    ("capability", "names", "runs"),
    [
        ((7, 5), ["sm_75"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90a", "compute_90a"], False),
        ((12, 1), ["sm_120"], True),
        ((6, 1), NEW, False),
        ((6, 1), [], True),
    ],
)
def test_kernels(capability: tuple[int, int], names: list[str], runs: bool) -> None:
    assert has_kernels(capability, names) == runs


# -- this machine


@no_gpu
def test_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))
    machine = observe("cuda:1", tmp_path / "out")
    assert machine.torch == torch.__version__
    assert machine.card is None
    assert bool(machine.refused) == (torch.version.cuda is not None)
    assert machine.output == Place(tmp_path / "out", machine.output.free)
    assert machine.cache is not None
    assert machine.cache.path == tmp_path / "cache"
    assert machine.output.free > 0
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    assert observe("cpu", tmp_path).refused == ""
    with caplog.at_level(logging.INFO, doctor.__name__):
        run_doctor(compose_config(["device=cpu"]), tmp_path)
    assert caplog.messages[0].startswith("machine: linux, torch 2.")
    assert caplog.messages[-1] == "result: nothing prevents training here"
    with pytest.raises(UserError, match="problems: 1"):
        run_doctor(compose_config(["device=cuda"]), tmp_path)
    with pytest.raises(ConfigError, match="no such device"):
        run_doctor(compose_config(["device=gpu"]), tmp_path)


def test_limits_of_the_shell(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    try:
        assert observe("cpu", tmp_path).open_files == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert place(tmp_path / "a" / "b").problem == ""
    assert place(tmp_path / "file" / "b").problem == "Not a directory"
    assert place(tmp_path / ("a" * 300)).problem == "File name too long"
    assert place(Path("/proc/out")).problem  # where not even root makes a file


def test_fp16_here() -> None:
    error = fp16_error(CPU)
    assert error is not None
    assert 0 < error < doctor.MOST_FP16_ERROR / 2


def test_the_version_of_a_driver() -> None:
    texts = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version:  12",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)",
    )
    assert [found[1] for text in texts if (found := DRIVER.search(text))] == ["550.54.14", "580.65.06"]


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="the kernel itself names the driver")
@pytest.mark.parametrize(("lines", "version"), [("echo 566.36", "566.36"), ("exit 9", ""), (None, None)])
def test_the_driver_by_its_program(
    lines: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lines is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert driver_version() == version


def test_a_finding_says_three_things() -> None:
    assert str(Finding("a", "b", "c", stops=True)) == "problem: a\n  why: b\n  do: c"
