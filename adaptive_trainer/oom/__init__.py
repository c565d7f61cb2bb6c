"""Out of memory: is an error one, of which kind, and how to give back what a failed step holds. Needs torch alone."""

from adaptive_trainer.oom.classify import Failure, Kind, SimulatedOutOfMemory, describe, is_out_of_memory, kinds_of
from adaptive_trainer.oom.release import clear_workspaces, forget_traceback, held, probe, release
from adaptive_trainer.oom.retry import OF_MEMORY, attempt, retry

__all__ = [
    "OF_MEMORY",
    "Failure",
    "Kind",
    "SimulatedOutOfMemory",
    "attempt",
    "clear_workspaces",
    "describe",
    "forget_traceback",
    "held",
    "is_out_of_memory",
    "kinds_of",
    "probe",
    "release",
    "retry",
]
