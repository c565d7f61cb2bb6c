"""What a sweep does beside its jobs: refuses what cannot be meant, has one rung for all, gathers exit codes.

Hydra's launchers run jobs in this process, in others, or on other machines.
"""

from __future__ import annotations

import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from adaptive_trainer.config.mistakes import explain
from adaptive_trainer.config.overrides import with_asked
from adaptive_trainer.errors import AdaptiveTrainerError, ConfigError, LadderExhausted, UserError, quoted
from adaptive_trainer.utils.files import write_whole
from adaptive_trainer.utils.screen import show_error

CODES = ".exit_codes"  # in the folder of the sweep, which jobs on other machines see too: a file for each job
LOST = ("UncompletedJobError", "TerminatedWorkerError")  # of submitit and of joblib's loky, which need not be here
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class Sweep(Callback):
    """What is done before the first job.

    Attributes:
        codes: the folder of exit codes, in the process that has begun the sweep.
        metric: what the sweep compares.
    """

    codes: ClassVar[Path | None] = None
    metric: ClassVar[str] = ""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse overrides that would make all jobs the same, forget the codes of an earlier sweep, choose the rung."""
        _check_overrides(config)
        Sweep.codes, Sweep.metric = Path(config.hydra.sweep.dir).absolute() / CODES, config.optimized_metric
        shutil.rmtree(Sweep.codes, ignore_errors=True)
        if "submitit" in config.hydra.launcher._target_:
            _outlive_lost_jobs(Sweep.codes)
        try:
            if config.ladder.same_rung:
                _have_same_rung(config)
        except Exception as error:  # of which Hydra would warn only
            ours = error if isinstance(error, AdaptiveTrainerError) else explain(error)
            end(traceback.format_exc(), 1) if ours is None else end(str(ours), ours.exit_code)


def is_elsewhere() -> bool:
    """Whether this is a job of a sweep that another process has begun."""
    return Sweep.codes is None


def leave_code(code: int) -> None:
    """Leave a job's exit code for the process that has begun the sweep."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.cwd, hydra_config.sweep.dir, CODES)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / str(hydra_config.job.num), str(code))


def codes_left() -> list[int]:
    """The exit codes that jobs in other processes have left."""
    return [] if Sweep.codes is None else [int(path.read_text()) for path in Sweep.codes.glob("*[0-9]")]


def compared() -> str:
    """The table of what the jobs have come to; empty where none has left a record."""
    if Sweep.codes is None:
        return ""
    from adaptive_trainer.report.sweep import summary

    try:
        return summary(Sweep.codes.parent, Sweep.metric)
    except UserError as error:  # a full disk; the jobs have ended well
        return f"warning: {error}"


def lost_job(error: Exception) -> str:
    """What to say of a job whose process was killed; empty for other errors."""
    if type(error).__name__ not in LOST:
        return ""
    first = str(error).strip().partition("\n")[0]
    return (
        "error: the process of a job has ended without a result: it was killed, perhaps for its memory. Its folder has "
        f"no result.json, or that of an earlier run; resume=auto output_dir=FOLDER goes on with it ({first})"
    )


def _outlive_lost_jobs(codes: Path) -> None:
    """Have a job of submitit whose process was killed give none, as one that fails: its error would end the sweep."""
    from submitit.core.core import Job

    results = Job.results

    def given(job: Any) -> list[Any]:
        try:
            return list(results(job))
        except Exception as error:
            said = lost_job(error)
            if not said:
                raise
        show_error(said)
        codes.mkdir(parents=True, exist_ok=True)
        write_whole(codes / f"lost-{job.job_id}", "1")
        return [JobReturn(status=JobStatus.COMPLETED)]

    Job.results = given  # type: ignore[method-assign, assignment]


def end(text: str, code: int = UserError.exit_code) -> NoReturn:
    """End the process with a message: of an exception in a callback Hydra would warn only."""
    show_error(f"error: {text}")
    sys.exit(code)


def _check_overrides(config: DictConfig) -> None:
    params = getattr(config.hydra.sweeper, "params", None) or {}
    for text in config.hydra.overrides.task:
        key, _, value = text.lstrip("+").partition("=")
        if key == "output_dir" and not re.search(r"[,$]|^(null)?$", value):
            end(
                f"{text} would be the folder of all jobs of this sweep, which has to be one for each; "
                f"hydra.sweep.dir={value} is a folder for the folders of all jobs"
            )
        if key in params:  # what is typed beats a file: all jobs would be the same
            end(f"{text} is typed, and +sweep=... sweeps {key}; leave one of them out")


def _have_same_rung(config: DictConfig) -> None:
    """Have every job begin at the highest rung that is predicted to fit each of them.

    Raises:
        ConfigError: the jobs are not known before they begin.
        LadderExhausted: there is no such rung.
    """
    from adaptive_trainer.cli.plan import ladders_of  # which brings torch
    from adaptive_trainer.planning.ladder_plan import highest_common

    ladders = []
    for settings in _jobs(config):
        with suppress(UserError):  # the job says it when it is its turn
            ladders += ladders_of(settings)
    if not ladders:
        return
    name = highest_common(ladders)
    if name is None:
        raise LadderExhausted(
            "ladder.same_rung=true: no rung is predicted to fit for all jobs, and one that may fit does not do; give "
            "them more memory (memory.limit), or smaller settings, or the rung yourself (ladder.start=RUNG). task=plan "
            "in place of training shows the rungs of each"
        )
    with open_dict(config):  # the sweeper hands on what is typed
        config.hydra.overrides.task.append(f"ladder.start={quoted(name)}")


def _jobs(config: DictConfig) -> Iterator[DictConfig]:
    """The settings of each job."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if config.hydra.sweeper._target_ != BASIC:
        raise ConfigError(
            f"ladder.same_rung=true needs jobs that are known beforehand, and {config.hydra.sweeper._target_} chooses "
            "them on the way; task=plan shows the rungs, and ladder.start=RUNG begins all jobs at one"
        )
    loader = GlobalHydra.instance().config_loader()
    typed = [*(f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items())]
    parsed = OverridesParser.create(loader).parse_overrides([*typed, *config.hydra.overrides.task])
    [jobs] = BasicSweeper.split_arguments(parsed, None)
    for overrides in jobs:
        settings = loader.load_sweep_config(config, overrides)
        OmegaConf.set_readonly(settings, False)
        with open_dict(settings):
            del settings["hydra"]  # as Hydra does for a job
        yield with_asked(settings, overrides)
