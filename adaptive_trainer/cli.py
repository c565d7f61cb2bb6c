"""The command line: Hydra composes the settings, the Trainer runs, errors become one message and an exit code.

Exit codes: 0 trained; 1 an unexpected error; 2 the user's mistake; 3 no rung of the ladder fits; 4 the device is
unusable; 75 stopped by a signal with its state saved.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from adaptive_trainer.config import config_dir, register
from adaptive_trainer.errors import AdaptiveTrainerError, DeviceUnusable, UserError

__all__ = ["main"]

log = logging.getLogger(__name__)


def main() -> None:
    """Entry of `python -m adaptive_trainer`; ends the process with the exit code."""
    register()
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback
    codes: list[int] = []

    def job(cfg: DictConfig) -> float:
        return _job(cfg, codes)

    try:
        hydra.main(config_path=config_dir(), config_name="config", version_base="1.3")(job)()
    except SystemExit as stop:
        if not codes and stop.code == 1:  # Hydra refused the settings before any job began
            codes.append(UserError.exit_code)
        elif not codes:
            raise
    except Exception:  # HYDRA_FULL_ERROR=1 lets everything through: it is shown whole, and the code stays the same
        traceback.print_exc()
        if not codes:
            codes.append(UserError.exit_code)
    if any(codes):
        sys.exit(max(codes))


def _job(cfg: DictConfig, codes: list[int]) -> float:
    """One run. Its error leaves as a new exception that holds text only, so nothing of a failed job lives on."""
    from adaptive_trainer import oom
    from adaptive_trainer.resume import saved_settings
    from adaptive_trainer.trainer import Trainer

    hydra_config = HydraConfig.get()
    folder = Path(cfg.output_dir or hydra_config.runtime.output_dir)
    whole_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failure: AdaptiveTrainerError | None = None
    try:
        cfg = saved_settings(cfg, hydra_config.overrides.task, folder)
        result = Trainer(cfg, output_dir=folder).fit()
    except AdaptiveTrainerError as error:
        codes.append(error.exit_code)
        if whole_traceback:
            raise
        failure = _bare(error)
    except Exception as error:
        found = oom.describe(error)
        codes.append(DeviceUnusable.exit_code if found.kind is oom.Kind.POISONED else 1)
        if whole_traceback or found.kind is not oom.Kind.POISONED:
            raise
        failure = DeviceUnusable(f"the device is unusable after: {found.text}. What was saved is in {folder}")
    if failure is None:
        codes.append(0)
        return float(result.metrics.get(cfg.optimized_metric, float("nan")))
    log.error("%s", failure)
    return float("nan")  # the other jobs of a sweep go on; the exit code tells


def _bare(error: AdaptiveTrainerError) -> AdaptiveTrainerError:
    """The same message and code with no traceback, cause or context."""
    bare = AdaptiveTrainerError(str(error))
    bare.exit_code = error.exit_code
    return bare
