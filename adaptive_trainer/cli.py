"""The command line: Hydra composes the settings, the Trainer runs, errors become one message and an exit code.

Exit codes: 0 trained; 1 an unexpected error; 2 the user's mistake; 3 no rung of the ladder fits; 4 the device is
unusable; 75 stopped by a signal with its state saved; 130 stopped by Ctrl-C before training.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from adaptive_trainer.checks import TASKS, check, check_no_card
from adaptive_trainer.config import at_home, config_dir, explained, register, typed, with_asked
from adaptive_trainer.earlier import begin, fail
from adaptive_trainer.errors import AdaptiveTrainerError, ConfigError, DeviceUnusable, Interrupted, UserError, remedy
from adaptive_trainer.folders import check_folders
from adaptive_trainer.ladder import resolve, stages
from adaptive_trainer.trust import frozen

__all__ = ["OutputFolder", "as_list", "main"]

log = logging.getLogger(__name__)


def main() -> None:
    """What `python -m adaptive_trainer` does; ends the process with the exit code."""
    register()
    is_sweep = bool({"-m", "--multirun"} & set(sys.argv))
    sys.argv[1:] = [as_list(at_home(argument), is_sweep) for argument in sys.argv[1:]]
    whole_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands over what went wrong, and prints nothing itself
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback
    codes: list[int] = []

    def job(cfg: DictConfig) -> float:
        return _job(cfg, codes, whole_traceback)

    try:
        hydra.main(config_path=config_dir(), config_name="config", version_base="1.3")(job)()
    except SystemExit:
        if not codes:
            raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not codes:  # whoever read what was printed has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return
        said = "" if codes or whole_traceback else _refusal(error)
        if said:
            print(f"{said}\n\nSet the environment variable HYDRA_FULL_ERROR=1 for a stack trace.", file=sys.stderr)
        else:
            traceback.print_exc()
        if not codes:  # before any job began
            codes.append(UserError.exit_code)
    if any(codes):
        sys.exit(max(codes))


def _refusal(error: Exception) -> str:
    """What Hydra, a YAML file or the disk has against a job before it begins; "" for an error of another kind."""
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return f"a YAML file cannot be read: {error}"
    # a group that is not there is an OSError too
    if isinstance(error, HydraException | OmegaConfBaseException | UserError):
        return explained(error)
    disk = error if isinstance(error, OSError) else error.__cause__  # of a log file that cannot be opened
    if isinstance(disk, OSError):
        return f"the output folder cannot be written: {disk}. {remedy(disk, 'hydra.run.dir')}"
    return explained(error) if isinstance(error, ValueError) else ""


class OutputFolder(Callback):
    """Makes Hydra's output folder before Hydra does, for a message instead of a traceback where that fails."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a single run."""
        self._make("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a sweep."""
        for text in config.hydra.overrides.task:
            if text.lstrip("+").startswith("output_dir=") and not {",", "$"} & set(text):
                print(
                    f"{text} would be the folder of all jobs of this sweep, which has to be one for each; "
                    f"hydra.sweep.dir={text.partition('=')[2]} is a folder for the folders of all jobs",
                    file=sys.stderr,
                )
                sys.exit(UserError.exit_code)
        self._refuse_double(config)
        self._make("hydra.sweep.dir", config.hydra.sweep.dir)

    def _refuse_double(self, config: DictConfig) -> None:
        """What is typed beats a file, and would leave a sweep of it jobs that are all the same."""
        typed_keys = {text.lstrip("+").partition("=")[0]: text for text in config.hydra.overrides.task}
        for key in getattr(config.hydra.sweeper, "params", None) or {}:
            if key in typed_keys:
                print(
                    f"{typed_keys[key]} is typed, and +sweep=... sweeps {key}; leave one of them out", file=sys.stderr
                )
                sys.exit(UserError.exit_code)

    def _make(self, key: str, folder: str) -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"{key}={folder} cannot be made: {error}. {remedy(error, key)}", file=sys.stderr)
            sys.exit(UserError.exit_code)


def as_list(argument: str, is_sweep: bool = False) -> str:
    """`batch=8,16` means the list [8,16], since Hydra keeps plain commas for sweeps; in a sweep, one job for each."""
    key, _, value = argument.partition("=")
    if key not in ("batch", "size") or "[" in value:
        return argument
    return f"{key}={','.join(f'[{each}]' for each in value.split(','))}" if is_sweep else f"{key}=[{value}]"


def _job(cfg: DictConfig, codes: list[int], whole_traceback: bool) -> float:
    """One run. Its error leaves as a new exception that holds text only, so nothing of a failed job lives on."""
    hydra_config = HydraConfig.get()
    folder = Path(cfg.output_dir or hydra_config.runtime.output_dir).expanduser()
    failure: AdaptiveTrainerError | None = None
    try:
        value = _run(cfg, hydra_config.overrides.task, folder)
    except AdaptiveTrainerError as error:
        codes.append(error.exit_code)
        if whole_traceback:
            raise
        if isinstance(error, Interrupted):
            log.error("%s", error)
            sys.exit(error.exit_code)  # not one job only: a sweep ends too
        failure = _bare(error)
        fail(folder, "failed", str(error))
    except Exception as error:
        from adaptive_trainer import oom

        found = oom.describe(error)
        codes.append(DeviceUnusable.exit_code if found.kind is oom.Kind.POISONED else 1)
        if whole_traceback or found.kind is not oom.Kind.POISONED:
            raise
        failure = DeviceUnusable(f"the device is unusable after: {found.text}. What was saved is in {folder}")
    if failure is None:
        codes.append(0)
        return value
    log.error("%s", failure)
    return float("nan")  # the other jobs of a sweep go on; the exit code tells


def _run(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> float:
    """The task that the settings name; what a sweep compares, NaN for a task without."""
    _check_mode()
    cfg = with_asked(cfg, overrides)
    if cfg.resume is None:  # else the settings are those of the resumed run
        _check(cfg)
    if cfg.task == "plan":
        from adaptive_trainer.plan_tasks import run_plan

        run_plan(cfg, folder)
    elif cfg.task == "memory":
        import torch

        from adaptive_trainer.device import device_of
        from adaptive_trainer.measure import measure
        from adaptive_trainer.plan_tasks import run_memory

        can_measure = cfg.card.name is None and torch.cuda.is_available() and device_of(cfg.device).type == "cuda"
        run_memory(cfg, folder, measure if can_measure else None)
    else:
        if cfg.resume is None:  # the import of torch takes seconds, in which the run may be stopped
            begin(folder, frozen(cfg))
        from adaptive_trainer.trainer import Trainer

        return float(Trainer(cfg, output_dir=folder).fit().metrics.get(cfg.optimized_metric, float("nan")))
    return float("nan")


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
    if cfg.task == "train":
        asked = stages(cfg)
        for _, settings in asked:
            resolve(settings)
        check_no_card(typed(cfg).card)
        check_folders(typed(asked[0][1]).data)


def _bare(error: AdaptiveTrainerError) -> AdaptiveTrainerError:
    """The same message and code with no traceback, cause or context."""
    bare = AdaptiveTrainerError(str(error))
    bare.exit_code = error.exit_code
    return bare
