"""The command line: Hydra composes the settings, the Trainer runs, errors become one message and an exit code.

Exit codes: 0 trained; 1 an unexpected error; those of `errors`; 130 stopped by Ctrl-C before training.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adaptive_trainer import __version__
from adaptive_trainer.checkpoints.trust import frozen
from adaptive_trainer.cli.help import help_text
from adaptive_trainer.cli.sweep import codes_left, compared, end, is_elsewhere, leave_code, lost_job
from adaptive_trainer.config.mistakes import explain, options_first
from adaptive_trainer.config.overrides import PATHS, config_dir, names_data, readable, register, typed, with_asked
from adaptive_trainer.config.schema import AFTER, TASKS
from adaptive_trainer.config.validate import check, check_after, check_no_card
from adaptive_trainer.data.images.folders import check_folders, evaluates_folder, evaluation_folder, photo_or_folder
from adaptive_trainer.errors import (
    AdaptiveTrainerError,
    ConfigError,
    DeviceUnusable,
    Interrupted,
    LadderExhausted,
    UserError,
    quoted,
    remedy,
    when_stopped,
)
from adaptive_trainer.ladder.resolve import resolve, stages
from adaptive_trainer.report.earlier import begin, fail, find
from adaptive_trainer.utils.files import existing_checkpoint
from adaptive_trainer.utils.launch import rank, restarts
from adaptive_trainer.utils.screen import show, show_error, showing, silence

log = logging.getLogger(__name__)

STOPPED = (Interrupted.exit_code, 130, 143)  # by a signal, see `errors.Stopped`


def main() -> None:
    """What `python -m adaptive_trainer` does; ends the process with the exit code."""
    register()
    whole_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands over what went wrong, and prints nothing itself
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback
    codes: list[int] = []  # of jobs in this process

    def job(cfg: DictConfig) -> float | None:
        code, value = _job(cfg, whole_traceback)
        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        if is_sweep and is_elsewhere():  # where `codes` is a copy
            leave_code(code)
            return value
        codes.append(code)
        if code in STOPPED:
            sys.exit(code)  # not one job only: a sweep ends too
        return value

    try:
        if page := _page(sys.argv[1:]):
            print(page, flush=True)
            return
        is_sweep = bool({"-m", "--multirun"} & set(sys.argv))
        sys.argv[1:] = options_first([as_list(readable(text), is_sweep) for text in sys.argv[1:]])
        with _wrapped() if "--help" in sys.argv else nullcontext(), _own_folder() if rank() else nullcontext():
            hydra.main(config_path=config_dir(), config_name="config", version_base="1.3")(job)()
    except SystemExit:
        if not codes:  # Hydra's own: that of a job ends a sweep, and the exit code is the largest of all jobs
            raise
    except Exception as error:  # of what comes before the jobs and after them
        if isinstance(error, BrokenPipeError) and not codes:  # whoever read what was printed has seen enough
            silence(sys.stdout.fileno())
            return
        ours = explain(error)
        said = lost_job(error) or ("" if codes or ours is None else f"error: {ours}")
        show_error(said if said and not whole_traceback else traceback.format_exc())
        codes.append(1 if ours is None else ours.exit_code)
    if not rank() and (text := compared()):
        show(text, sys.stdout)
    if any(codes := [*codes, *codes_left()]):
        sys.exit(max(codes))


@contextmanager
def _own_folder() -> Iterator[None]:
    """Let Hydra write what it says of another rank than the first into a folder that nobody looks at."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.argv += [f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
        yield


@contextmanager
def _wrapped() -> Iterator[None]:
    """Show what Hydra prints in lines that fit the screen."""
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:  # Hydra ends the process once it has printed
        if text := printed.getvalue().rstrip():
            show(text, sys.stdout)


def _page(arguments: Sequence[str]) -> str | None:
    """What is printed in place of a run; None: Hydra answers."""
    if "-h" in arguments:
        return help_text()
    return f"adaptive_trainer {__version__}" if "--version" in arguments else None


class OutputFolder(Callback):
    """Makes Hydra's output folder before Hydra does, for a message instead of a traceback where that fails."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a single run."""
        self._make(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a sweep."""
        self._make(config, "hydra.sweep.dir")

    def _make(self, config: DictConfig, key: str) -> None:
        with suppress(OmegaConfBaseException):  # a folder that does not resolve, which Hydra finds too
            folder = OmegaConf.select(config, key)
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                end(f"{key}={folder} cannot be made: {error}. {remedy(error, key)}")


def as_list(argument: str, is_sweep: bool = False) -> str:
    """`batch=8,16` means the list [8,16], since Hydra keeps plain commas for sweeps; in a sweep, one job for each."""
    key, _, value = argument.partition("=")
    if key not in ("batch", "size") or "[" in value:
        return argument
    return f"{key}={','.join(f'[{each}]' for each in value.split(','))}" if is_sweep else f"{key}=[{value}]"


def _job(cfg: DictConfig, whole_traceback: bool) -> tuple[int, float | None]:
    """One run: its exit code and what a sweep compares, None where there is nothing. What goes wrong is shown."""
    hydra_config = HydraConfig.get()
    overrides = hydra_config.overrides.task
    if hydra_config.job.chdir:
        cfg, overrides = _from_folder(cfg, overrides, Path(hydra_config.runtime.cwd))
    folder = Path(cfg.output_dir or hydra_config.runtime.output_dir).expanduser()
    try:
        with showing(cfg.verbosity):
            value = _run(cfg, overrides, folder)
    except Exception as error:  # not left to Hydra: it would hold what failed, and begin no further job of a sweep
        code, said = _ended(error, folder)
        if isinstance(error, UserError):
            fail(folder, "failed", str(error))
        if not (rank() and isinstance(error, Interrupted | LadderExhausted)):  # which all ranks share
            show_error(traceback.format_exc() if whole_traceback else said)
        return code, None  # the other jobs of a sweep go on; the exit code says it
    return 0, value if math.isfinite(value) else None


def _ended(error: Exception, folder: Path) -> tuple[int, str]:
    """The exit code of a run that ended with an error, and what is shown of it."""
    if isinstance(error, OmegaConfBaseException):  # a value that does not resolve
        error = explain(error) or error
    if isinstance(error, AdaptiveTrainerError):
        return error.exit_code, error.shown if isinstance(error, Interrupted) else f"error: {error}"
    from adaptive_trainer import oom  # which brings torch: a mistake is said without it

    found = oom.describe(error)
    if found.kind is oom.Kind.POISONED:
        saved = f"What was saved is in {folder}"
        return DeviceUnusable.exit_code, f"error: the device is unusable after: {found.text}. {saved}"
    first = str(error).strip().partition("\n")[0]
    return 1, f"error: {type(error).__name__}: {first}\n\n{traceback.format_exc()}"


def _from_folder(cfg: DictConfig, overrides: Sequence[str], start: Path) -> tuple[DictConfig, list[str]]:
    """Settings, and the overrides typed for them, with paths from where the program started: Hydra has left it."""
    cfg, typed_again = cfg.copy(), list(overrides)
    for key in PATHS:
        value = OmegaConf.select(cfg, key)
        if value and value != "auto":
            path = str(start / Path(value).expanduser())
            OmegaConf.update(cfg, key, path)
            for number, text in enumerate(typed_again):  # a stage is given what was typed once more
                if text.lstrip("+").startswith(f"{key}="):
                    typed_again[number] = f"{key}={quoted(path)}"
    return cfg, typed_again


def _run(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> float:
    """The task that the settings name; what a sweep compares, NaN for a task without."""
    if rank() and cfg.task != "train":  # what one rank does alone
        return float("nan")
    log.debug("the settings are composed")  # scripts/benchmark_start.py reads these lines
    _check_mode()
    typed(cfg)  # names a setting that does not resolve
    cfg = with_asked(cfg, overrides)  # Hydra forgets the difference between what was typed and what a file says
    if cfg.resume is None or cfg.task in AFTER:  # else the settings are those of the resumed run
        _check(cfg)
    elif cfg.task == "train":
        find(cfg.resume, folder, may_begin=names_data(cfg))  # for its errors: training looks once more
    if cfg.task == "plan":
        with _uncollected():
            from adaptive_trainer.cli.plan import run_plan

        run_plan(cfg, folder)
    elif cfg.task == "memory":
        with _uncollected():
            import torch

            from adaptive_trainer.cli.plan import run_memory
            from adaptive_trainer.training.measure import measure
            from adaptive_trainer.utils.device import device_of

        # What is measured here says nothing about a card that is named.
        can_measure = cfg.card.name is None and torch.cuda.is_available() and device_of(cfg.device).type == "cuda"
        run_memory(cfg, folder, measure if can_measure else None)
    elif cfg.task == "doctor":
        with _uncollected():
            from adaptive_trainer.cli.doctor import run_doctor

        run_doctor(cfg, folder)
    elif cfg.task in AFTER:
        with _uncollected():
            from adaptive_trainer.cli.trained import RUN

        with when_stopped(lambda: f"task={cfg.task} is not finished, and has to begin again"):
            return RUN[cfg.task](cfg, folder)
    else:
        if (
            cfg.resume is None and not rank() and not restarts()
        ):  # the import of torch takes seconds, in which the run may be stopped
            begin(folder, frozen(cfg))
        with _uncollected():
            from adaptive_trainer.training.trainer import Trainer

        return float(Trainer(cfg, output_dir=folder).fit().metrics.get(cfg.optimized_metric, float("nan")))
    return float("nan")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import packages without looking for garbage among what they define, now and later."""
    # Hundreds of thousands of objects that stay: to go through them takes a quarter of the imports, most of every
    # collection in training, and a second when the process ends.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _check_mode() -> None:
    """Refuse a sweep that is asked for without the switch that makes Hydra run it."""
    hydra_config = HydraConfig.get()
    swept = getattr(hydra_config.sweeper, "params", None)  # which not every sweeper has
    if hydra_config.mode == RunMode.RUN and swept:
        values = ", ".join(f"{key}={text}" for key, text in swept.items())
        raise ConfigError(f"a sweep ({values}) runs with -m in front of the overrides; without it, leave +sweep out")


def _check(cfg: DictConfig) -> None:
    """Refuse what can be refused without torch, whose import takes seconds."""
    if cfg.task not in TASKS:
        check(typed(cfg))
    if cfg.task in AFTER:
        check_after(cfg)
    if cfg.model.weights is not None and cfg.task in ("train", *AFTER):
        existing_checkpoint(cfg.model.weights)
    if cfg.task == "predict":
        photo_or_folder(cfg.data.root)
    if cfg.task == "evaluate" and evaluates_folder(typed(cfg).data):
        evaluation_folder(cfg.data.root, ())
    if cfg.task in ("train", "plan"):
        asked = stages(cfg)
        for _, settings in asked:
            resolve(settings)  # for its errors: both resolve once more, with the networks to ask
    if cfg.task in ("train", "doctor"):
        check_no_card(typed(cfg).card)
    if cfg.task == "train" or (cfg.task == "plan" and cfg.data.root):
        check_folders(typed(asked[0][1]).data)
