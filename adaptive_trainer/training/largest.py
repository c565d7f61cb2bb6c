"""`trainer.batch_size=max`: the largest batch size whose updates are proven on the device.

A prediction says where to look and never takes the place of the proof: at the end the size that is used has been
proven, and the next one has been tried and has run out of memory, unless there are no more training samples.
"""

from __future__ import annotations

from omegaconf import DictConfig

from adaptive_trainer.config.schema import LARGEST
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import DEFAULT_BATCH, Rung, resolve, with_batch_size
from adaptive_trainer.ladder.search import largest
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.training.stage import Stage


def settle(stage: Stage, settings: DictConfig) -> None:
    """Give the stage the ladder of the largest batch size; a resumed stage keeps the one that was found.

    Args:
        stage: its ladder stands for any batch size.
        settings: of the stage, with `trainer.batch_size=max`.

    Raises:
        ConfigError: nothing limits the memory, or the run that is resumed has a batch size already.
    """
    if stage.saved is not None:
        size, why = _kept(stage.saved.get("largest_batch"), stage.saved["requested"]["batch_size"])
    elif stage.parts.capacity.room() is None:
        raise ConfigError(
            f"trainer.batch_size={LARGEST} needs a limit on memory, and there is none here "
            f"({stage.parts.capacity.description}); set memory.limit=2GiB, or give trainer.batch_size a number"
        )
    else:
        size, why = _found(stage)
    stage.largest, stage.why = size, why
    stage.ladder = stage.parts.prepare(resolve(settings, size, why))
    for note in stage.ladder[0].notes:
        stage.record.event(note)


def _kept(found: int | None, used: int) -> tuple[int, str]:
    if found is None:
        raise ConfigError(
            f"trainer.batch_size={LARGEST} is for the start of a run, and the one that is resumed has batch size "
            f"{used}; give trainer.batch_size a number, or start anew with resume=null"
        )
    return found, "found when the run began; a resumed run keeps it"


def _found(stage: Stage) -> tuple[int, str]:
    """The batch size, and why this one."""
    config, most = stage.ladder[0].settings, stage.parts.train_size
    tries: dict[int, bool] = {}

    def holds(size: int) -> bool:
        tries[size] = stage.holds(Rung(f"{LARGEST}-{size}", with_batch_size(config, size)))
        return tries[size]

    predicted = stage.forecast.largest_batch(config, most)
    guess = DEFAULT_BATCH if predicted is None else predicted
    step = guess if predicted is None else max(1, guess // 100)  # a prediction is near, a default may be far
    least = min(2, most)
    size = largest(holds, guess=guess, step=step, least=least, most=most)
    if size is None and least > 1 and holds(1):
        size = 1
    room = format_bytes(stage.parts.capacity.room() or 0)
    told = "not predicted" if predicted is None else f"predicted {predicted}"
    effort = f"({told}, {len(tries)} tried, {len(tries) - sum(tries.values())} failed)"
    if size is None:
        return least, f"not even that is proven in {room}, so the ladder goes on from there {effort}"
    if size == most:
        return size, f"proven in {room}, and there are no more training samples {effort}"
    return size, f"{size} is proven and {size + 1} ran out of memory in {room} {effort}"
