"""What the ranks decide together of a rung: the part of a batch that each takes, and one plan of recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adaptive_trainer.config.schema import MEMORY, SPEED, Config
from adaptive_trainer.data.position import shares
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import recipe, with_shares
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.models.savers.recompute import PLANNED
from adaptive_trainer.planning.judge import Judge


class Parting:
    """Decides for each rung, once, which part of a batch each rank takes, and plans for the rank that is the tightest.

    Args:
        samples: of the training set.
        saved: a checkpoint to go on from: ranks that ask for the same, on the same cards, keep the parts of its rung.
    """

    def __init__(self, judge: Judge, samples: int, saved: dict[str, Any] | None) -> None:
        self._judge, self._samples = judge, samples
        self._known: dict[tuple[str, str], list[int]] = {}  # by rung, and what was asked for
        if saved is None or saved.get("cards") != peers().cards:
            return
        if isinstance(parts := saved["config"]["trainer"]["shares"], list):
            self._known[saved["rung"], str(saved["requested"].get("shares"))] = parts

    def planned(self, rung: Rung[Config]) -> Rung[Config]:
        """The rung with the parts of the ranks, and a plan of recomputation, where its settings leave these open.

        Raises:
            ConfigError: there is nothing that the parts could be in proportion to.
        """
        rung = self.parted(rung)
        if peers().size == 1 or rung.settings.trainer.recompute not in PLANNED:
            return self._judge.planned(rung)
        tightness = peers().gathered(self._judge.tightness(rung.settings))
        is_tightest = tightness.index(max(tightness)) == peers().rank
        made = peers().gathered(self._judge.planned(rung) if is_tightest else None)
        return next(filter(None, made))

    def parted(self, rung: Rung[Config]) -> Rung[Config]:
        """The rung with the parts of the ranks; of one that was planned before, no rank waits for another."""
        asked, size, ranks = rung.settings.trainer.shares, rung.settings.trainer.batch_size, peers().size
        if isinstance(asked, list) and len(asked) != ranks:
            raise ConfigError(
                f"trainer.shares={asked} has {len(asked)} numbers; give one for each rank (here {ranks}), or use equal"
            )
        if ranks == 1 or asked not in (MEMORY, SPEED):
            return rung
        parts = self._known.get((rung.name, asked), [])
        if len(parts) != ranks or sum(parts) != size:
            parts = self._known[rung.name, asked] = list(shares(size, tuple(self._weights(rung.settings))))
        note = f"shares of the ranks by {asked}: {', '.join(map(str, parts))} of {size} samples"
        return replace(rung, settings=with_shares(rung.settings, parts), notes=(*rung.notes, note))

    def assess(self, config: Config) -> tuple[str, int | None]:
        """Why these settings are hopeless now on one of the ranks, and the bytes they are predicted to need on this."""
        reason, need = self._judge.assess(config)
        reasons = peers().gathered(reason)
        found = next(filter(None, reasons), "")
        return f"on rank {reasons.index(found)} {found}" if found and not reasons[0] else found, need

    def largest_batch(self, config: Config) -> int | None:
        """The largest batch size that is predicted to fit on all ranks; None where that is not known."""
        fits = [fit for _, fit in self._rooms(config)]
        if None in fits:
            return None
        weights = self._weights(config)
        least = min(fit / weight for fit, weight in zip(fits, weights, strict=True) if weight and fit is not None)
        return min(int(least * sum(weights)), self._samples)

    def _weights(self, config: Config) -> Sequence[float]:
        """What the parts of the ranks are in proportion to."""
        if config.trainer.shares == SPEED:
            seconds = peers().gathered(self._judge.seconds(_all_here(config)))
            known = [each for each in seconds if each is not None]
            if len(known) < peers().size:
                raise ConfigError(
                    "trainer.shares=speed goes by the predicted time of an update, which is known of networks that can "
                    "be traced, on CUDA cards; use equal, memory, or a number for each rank"
                )
            return [1 / each for each in known]
        if config.trainer.shares != MEMORY:
            return recipe(config).weights(peers().size)
        rooms, fits = zip(*self._rooms(config), strict=True)
        if None in rooms:
            raise ConfigError(
                f"trainer.shares=memory needs a limit on memory, and rank {rooms.index(None)} has none; set "
                "memory.limit, or use equal, or a number for each rank"
            )
        # by the memory itself, where it is not known what fits in it, or nothing does
        return rooms if None in fits or not any(fits) else fits

    def _rooms(self, config: Config) -> list[tuple[int | None, int | None]]:
        """Bytes that each rank could hold now, and the largest part of a batch that is predicted to fit there."""
        judge = self._judge
        return peers().gathered((judge.capacity.room(), judge.largest_batch(_all_here(config), self._samples)))


def _all_here(config: Config) -> Config:
    """The same settings, with the whole batch on this rank."""
    return with_shares(config, [int(rank == peers().rank) for rank in range(peers().size)])
