"""`task=doctor`: what on this machine stands in the way of a training, why it matters, and what to type.

A check is a function of the machine and the settings that yields findings; `CHECKS` lists them. Nothing is changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from adaptive_trainer.cli.machine import Machine, observe
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config, TrainerConfig
from adaptive_trainer.config.validate import check
from adaptive_trainer.errors import UserError
from adaptive_trainer.memory.processes import GpuProcess
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.planning.predictor import ALLOCATOR
from adaptive_trainer.utils.device import device_of

log = logging.getLogger(__name__)

MiB = 2**20
OURS = re.compile(r"cuda(:\d+)?")  # devices that are looked for here, so that it is said why there is none
WHEELS = "https://download.pytorch.org/whl/"
FIRST_OF_CU128 = (7, 5)  # compute capability; https://github.com/pytorch/pytorch/issues/157517
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")
# TU116 and TU117: https://github.com/pytorch/pytorch/issues/77955, https://github.com/ultralytics/ultralytics/pull/17977
BROKEN_FP16 = re.compile(r"\b(GTX 16[356]0|T400|T500|T550|T600|T1000|T1200|T2000)\b", re.IGNORECASE)
MOST_FP16_ERROR = 0.05  # share of the largest value; rounding makes less than 0.01
FIRST_TO_SPILL = (536, 40)  # Windows driver; https://nvidia.custhelp.com/app/answers/detail/a_id/5490
PREFETCHED = 2  # batches that each worker has ready, as torch's DataLoader does by default
LEAST_FILES, FILES_OF_A_WORKER = 256, 32
LEAST_FREE = 128 * MiB  # of a card: the last rung of the default ladder needs 74 MiB
LEAST_DISK, ROOM_ON_DISK = 64 * MiB, 1024 * MiB

HIDES = "CUDA_VISIBLE_DEVICES"
VARIABLES = {
    **dict.fromkeys(ALLOCATOR, "memory is predicted for the usual allocator: no rung is skipped by a prediction now"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each tensor is taken from the driver: slow, and memory.limit limits nothing",
    "CUDA_LAUNCH_BLOCKING": "Python waits for each kernel: slow, and only of use to find a bug",
}
# Whose a process is, by its name, and how its memory comes free.
BROWSERS = "chrome|chromium|firefox|msedge|brave|opera|vivaldi|webview"
DESKTOPS = "xorg|wayland|gnome|kwin|plasma|mutter|cinnamon|xfwm|compiz|dwm|explorer|hyprland|sway"
CLOSE_BROWSER = "Close it, or turn off hardware acceleration in its settings"
LEAVE_DESKTOP = (
    "Plug the monitor into the mainboard. Or train without a desktop: on Linux 'sudo systemctl isolate "
    "multi-user.target' ends it, with all that is open in it"
)
END_PYTHON = (
    "A notebook keeps its memory until its kernel is shut down, a crashed run until its last process has ended. End it "
    "where it was started; if it is yours and forgotten: 'kill PID' ('taskkill /PID PID' on Windows)"
)
KINDS = (
    ("a browser", BROWSERS, CLOSE_BROWSER),
    ("the desktop", DESKTOPS, LEAVE_DESKTOP),
    ("a Python program", "python|jupyter|ipykernel", END_PYTHON),
    ("another program", "", "Close it if you do not need it"),
)


@dataclass(frozen=True)
class Finding:
    """What was found, why it matters, what to do; `stops`: training cannot begin, or leaves the card unused."""

    what: str
    why: str
    do: str
    stops: bool = False

    def __str__(self) -> str:
        """Three lines for people."""
        return f"{'problem' if self.stops else 'note'}: {self.what}\n  why: {self.why}\n  do: {self.do}"


def run_doctor(cfg: DictConfig, folder: Path) -> None:
    """Log what stands in the way of a training with these settings.

    Raises:
        ConfigError: a setting cannot be right.
        UserError: with what was found training cannot begin, or leaves the card unused.
    """
    config = typed(cfg)
    check(config)
    if not OURS.fullmatch(config.device):
        device_of(config.device)  # refuses what is none
    machine = observe(config.device, folder)
    log.info("%s", summary(machine))
    found = findings(machine, config)
    for each in found:
        log.log(logging.WARNING if each.stops else logging.INFO, "%s", each)
    if stopping := sum(each.stops for each in found):
        raise UserError(f"problems: {stopping}; what to do is said above")
    log.info("result: nothing prevents training here")


def summary(machine: Machine) -> str:
    """The machine in a few words."""
    built = f"for CUDA {machine.cuda}" if machine.cuda else "for the CPU alone"
    driver = "no NVIDIA driver" if machine.driver is None else f"NVIDIA driver {machine.driver or 'of unknown version'}"
    lines = [f"machine: {machine.system}, torch {machine.torch} built {built}, {driver}"]
    if card := machine.card:
        free = f"{format_bytes(card.free)} of {format_bytes(card.total)} free"
        lines.append(f"card: {card.name}, compute capability {_version(card.capability)}, {free}")
    lines.append(f"output folder: '{machine.output.path}', {format_bytes(machine.output.free)} free")
    return "\n".join(lines)


def findings(machine: Machine, config: Config) -> list[Finding]:
    """What all checks find, with what stops a training first."""
    found = [finding for each in CHECKS for finding in each(machine, config)]
    return sorted(found, key=lambda finding: not finding.stops)


def driver_and_build(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether torch gets to the card, and if not, what of the two is missing."""
    if machine.card is not None or config.device == "cpu":
        return
    why = "training runs on the CPU, many times slower than on a card"
    if machine.driver is None:
        yield Finding(
            "no NVIDIA card is seen here, and no driver",
            why,
            "Nothing, if there is no card. Else install its driver: https://www.nvidia.com/drivers (a container needs "
            "'docker run --gpus all'). For a card elsewhere: task=plan card=rtx2060",
            stops=config.device != "auto",
        )
    elif machine.cuda is None:
        yield Finding(
            f"torch {machine.torch} is built for the CPU alone, and this machine has an NVIDIA driver",
            why,
            _install("cu128"),
            stops=True,
        )
    elif "out of memory" in machine.refused:
        yield Finding(
            f"the card is full: not even CUDA starts on it ({machine.refused})",
            why,
            "Look with 'nvidia-smi' who holds its memory, and end that",
            stops=True,
        )
    else:
        hidden = machine.environment.get(HIDES)
        show = "" if hidden is None else f"{HIDES}={hidden} may hide it: {_unset(machine, HIDES)}. "
        yield Finding(
            f"torch takes no card: {machine.refused}",
            why,
            f"{show}Where 'nvidia-smi' lists the card, the driver is mostly older than CUDA {machine.cuda} wants: "
            "update it from https://www.nvidia.com/drivers. Where it lists none, restart the machine",
            stops=True,
        )


def architectures(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether torch has kernels for the card."""
    card = machine.card
    if card is not None and not has_kernels(card.capability, machine.architectures):
        yield Finding(
            f"torch {machine.torch} has no kernels for {card.name} ({_version(card.capability)}); it has "
            f"{', '.join(machine.architectures)}",
            "the first operator on the card ends with 'no kernel image is available'",
            _install("cu126" if card.capability < FIRST_OF_CU128 else "cu128"),
            stops=True,
        )


def has_kernels(capability: tuple[int, int], names: Sequence[str]) -> bool:
    """Whether code for these architectures runs on a card; True where none of the names is understood.

    Binary code runs from its own minor version on within a major one, PTX on all later cards, and code with a letter
    on its own architecture: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities.
    """
    known = [match for name in names if (match := ARCHITECTURE.fullmatch(name))]
    for kind, major, minor, letter in (match.groups() for match in known):
        built = int(major), int(minor)
        is_later = capability >= built and (kind == "compute" or capability[0] == built[0])
        if capability == built or (is_later and not letter):
            return True
    return not known


def fp16(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the card computes in fp16 what it should."""
    card = machine.card
    if card is None:
        return
    is_wrong = card.fp16_error is not None and card.fp16_error > MOST_FP16_ERROR
    if is_wrong or BROKEN_FP16.search(card.name):
        yield Finding(
            f"{card.name} computes a small convolution in fp16 wrongly"
            if is_wrong
            else f"cards such as {card.name} are known for fp16 convolutions that give NaN, mostly with larger batches",
            "losses become NaN, and rung 'amp' of the default ladder trains in fp16",
            "Keep trainer.precision=fp32, and use 'ladder=exact', none of whose rungs changes the precision",
            stops=is_wrong and config.trainer.precision == "fp16",
        )


def memory(machine: Machine, config: Config) -> Iterator[Finding]:
    """Who else holds memory of the card."""
    card = machine.card
    if card is None:
        return
    why = f"{format_bytes(card.free)} of {format_bytes(card.total)} are left for training"
    named = [] if isinstance(card.users, str) else card.users
    for kind, users, advice in _by_kind(named):
        names = ", ".join(f"{each.name} (pid {each.pid}, {format_bytes(each.bytes)})" for each in users)
        yield Finding(f"{kind} holds memory of the card: {names}", why, advice)
    if not named and 2 * card.free < card.total:
        unknown = card.users if isinstance(card.users, str) else "the driver names no process"
        yield Finding(
            f"more than half of the card is taken, and by whom is not known: {unknown}",
            why,
            "Look with 'nvidia-smi', in a container outside of it; where it names nobody, restart the machine",
        )
    if card.free < LEAST_FREE:
        yield Finding(
            f"the card is full: {format_bytes(card.free)} free",
            "not even the last rung of the ladder fits",
            "Free memory as said of those who hold it",
            stops=True,
        )


def _by_kind(users: Sequence[GpuProcess]) -> Iterator[tuple[str, list[GpuProcess], str]]:
    left = list(users)
    for kind, pattern, advice in KINDS:
        if its := [each for each in left if re.search(pattern, each.name, re.IGNORECASE)]:
            yield kind, its, advice
        left = [each for each in left if each not in its]


def variables(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the environment changes the allocator, or makes CUDA slow."""
    for name, why in VARIABLES.items():
        if (value := machine.environment.get(name, "")) not in ("", "0"):
            yield Finding(f"the environment has {name}={value}", why, f"Unless it is meant: {_unset(machine, name)}")


def shared_memory(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the batches of all data workers have room in shared memory."""
    workers, size = config.data.num_workers, config.trainer.batch_size
    samples = size if isinstance(size, int) else TrainerConfig().batch_size
    each = PREFETCHED * samples * 3 * config.data.image_size**2 * 4  # fp32
    if machine.shared is not None and workers * each > machine.shared:
        yield Finding(
            f"/dev/shm has {format_bytes(machine.shared)} free, and {workers} data workers need about "
            f"{format_bytes(workers * each)}",
            "a worker that finds no room is killed ('bus error'), and training goes on with fewer, which load slower",
            f"data.num_workers={machine.shared // each}; or in a container 'docker run --shm-size=2g'",
        )


def open_files(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether a process may open as many files as its data workers want."""
    needed = LEAST_FILES + FILES_OF_A_WORKER * config.data.num_workers
    if machine.open_files is not None and machine.open_files < needed:
        yield Finding(
            f"a process may open {machine.open_files} files",
            "data workers hand batches over as open files, and loading ends with 'too many open files'",
            f"'ulimit -n {max(4096, needed)}', or data.num_workers=0",
        )


def address_space(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether addresses are limited, of which CUDA takes more than there is memory."""
    if machine.address_space is not None and (machine.card or machine.cuda):
        yield Finding(
            f"a process may use {format_bytes(machine.address_space)} of addresses",
            "CUDA reserves many times the memory of the card, and fails to start without them",
            "'ulimit -v unlimited'",
        )


def spill(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the driver lends system memory where the card is full."""
    card = machine.card
    if card is None or machine.system not in ("windows", "wsl") or _is_before_spilling(machine.driver):
        return
    where = (
        "NVIDIA Control Panel, Manage 3D Settings, Program Settings, the python.exe that trains"
        if machine.system == "windows"
        else "in Windows: NVIDIA Control Panel, Manage 3D Settings, Global Settings"
    )
    yield Finding(
        "the Windows driver may lend system memory where the card is full (this cannot be read from here)",
        "out-of-memory then never comes: the ladder takes no step, and updates take many times as long. It is seen in "
        "the Task Manager, Performance, GPU: 'Shared GPU memory' grows while it trains",
        f"{where}: 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback' (driver 546.01 or later). Or keep "
        f"below what is free: memory.limit={card.free * 9 // 10 // MiB}MiB",
    )


def _is_before_spilling(driver: str | None) -> bool:
    numbers = tuple(int(part) for part in (driver or "").split(".") if part.isdigit())
    return bool(numbers) and numbers < FIRST_TO_SPILL


def disk(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether checkpoints can be written."""
    place = machine.output
    if place.problem or place.free < ROOM_ON_DISK:
        what = (
            f"no file can be made in it ({place.problem})" if place.problem else f"{format_bytes(place.free)} are free"
        )
        yield Finding(
            f"output folder '{place.path}': {what}",
            "report and checkpoints are written there; each of an EfficientNet-B0 with AdamW takes about 50 MiB",
            "Free some space, or choose another folder: output_dir=FOLDER",
            stops=bool(place.problem) or place.free < LEAST_DISK,
        )


def cache_folder(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether predictions and measurements can be kept."""
    place = machine.cache
    if place is None or place.problem:
        what = "there is no cache folder" if place is None else f"cache folder '{place.path}': {place.problem}"
        export = "set" if machine.system == "windows" else "export"
        yield Finding(
            what,
            "what was predicted and measured is forgotten, so that each run predicts and tries anew",
            f"'{export} ADAPTIVE_TRAINER_CACHE=FOLDER'",
        )


def _unset(machine: Machine, name: str) -> str:
    return f"'set {name}='" if machine.system == "windows" else f"'unset {name}'"


def _install(wheels: str) -> str:
    command = f"pip install --force-reinstall torch torchvision --index-url {WHEELS}{wheels}"
    return f"'{command}'; https://pytorch.org/get-started/locally has the choices for other drivers and cards"


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


Check = Callable[[Machine, Config], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    driver_and_build, architectures, memory, spill, fp16, variables, shared_memory, open_files, address_space, disk,
    cache_folder,
)  # fmt: skip
