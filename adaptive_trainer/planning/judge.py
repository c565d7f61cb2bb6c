"""What the descent knows of a rung before it is tried, and what it remembers afterwards."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

import torch
from omegaconf import DictConfig

from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.distributed.peers import ELSEWHERE
from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.ladder.resolve import with_plan, without_savers
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.recomputing.plan import NONE
from adaptive_trainer.planning import exact, refusals
from adaptive_trainer.planning.cache import Key, Measurement, PlanCache
from adaptive_trainer.planning.concrete import largest_batch
from adaptive_trainer.planning.device_spec import DeviceSpec, speed_of
from adaptive_trainer.planning.networks import ModelFactory
from adaptive_trainer.planning.predictor import LossFactory, Predictor, other_allocator
from adaptive_trainer.planning.recomputation import MARGIN, Planner
from adaptive_trainer.prediction.estimator import Verdict, verdict
from adaptive_trainer.prediction.timeline import timeline
from adaptive_trainer.prediction.tracer import TraceError
from adaptive_trainer.report.listeners import Timeline
from adaptive_trainer.utils.device import capability_of, precision_refusal
from adaptive_trainer.utils.files import default_folder

LESS = 0.97  # times the predicted need of a plan that has failed: what the next one may need


class Judge:
    """Judges rungs by prediction, and by what this card measured earlier.

    Args:
        capacity: the memory that training may use.
        make_model, make_loss: as the Trainer was given them; None where it uses its own.
        stored_size: height and width of stored images (`data.cache`); 0 where there are none.
        val_size: samples of the validation set, above which no evaluation batch is; None where that is not known.
    """

    def __init__(
        self,
        capacity: Capacity,
        num_classes: int,
        make_model: ModelFactory | None = None,
        make_loss: LossFactory | None = None,
        stored_size: int = 0,
        val_size: int | None = None,
    ) -> None:
        self.capacity = capacity
        self._is_cuda = capacity.device.type == "cuda"
        self._card = torch.cuda.get_device_name(capacity.device) if self._is_cuda else "simulated"  # in keys
        self._failed: list[tuple[ModelConfig, int, int]] = []  # model, predicted need and room
        self._room_before = 0  # a dry run, in which kernels are loaded beside the allocator
        self._predictor = Predictor(
            DeviceSpec(
                capacity.description,
                self._is_cuda,
                capability_of(capacity.device),
                capacity.room(),
                speed=speed_of(torch.cuda.get_device_properties(capacity.device)) if self._is_cuda else None,
            ),
            num_classes=num_classes,
            make_model=make_model,
            make_loss=make_loss,
            cache=PlanCache(default_folder()),
            stored_size=stored_size,
            val_size=val_size,
        )
        self._planner = Planner(self._predictor)

    def _failed_of(self, config: Config) -> list[int]:
        """What rungs with this network were predicted to need, that have failed."""
        return [need for model, need, _ in self._failed if model == config.model]

    def tightness(self, config: Config) -> tuple[int, float]:
        """How tight it is here without recomputation: failures with this network, and predicted need over room."""
        need = self._predictor.predict(with_plan(config, NONE)).min_capacity_bytes
        return len(self._failed_of(config)), (need or 0) / (self.capacity.room() or math.inf)

    def planned(self, rung: Rung[Config]) -> Rung[Config]:
        """The rung with a plan of recomputation for the room that there is now, where its settings ask for one."""
        room = self.capacity.room()
        if room is not None:  # what has failed does not fit, whatever was predicted of it
            failed = self._failed_of(rung.settings)
            room = min([room, *(int(MARGIN * LESS * need) for need in failed)])  # the planner takes the margin off
        settings = self._planner.planned(rung.settings, room)
        if settings is rung.settings:
            return rung
        for_room = "no limit is known" if room is None else f"planned for {format_bytes(room)}"
        return replace(rung, settings=settings, notes=(*rung.notes, f"recomputation of rung {rung.name}, {for_room}"))

    def assess(self, config: Config) -> tuple[str, int | None]:
        """Why these settings are hopeless now ("" where they are not), and the bytes they are predicted to need."""
        room = self.capacity.room()
        if room is None:
            return "", None
        prediction = self._predictor.recalled(config)
        if prediction is None:
            weights = self._predictor.networks.weights_bytes(config)
            if weights > room:  # a trace would take about ten times as long
                return f"its weights alone take {format_bytes(weights)}, and there are {format_bytes(room)}", weights
            prediction = self._predictor.predict(config)
        need, measured = prediction.min_capacity_bytes, self._measurement(config).verdict(room)
        if measured == Verdict.HOPELESS:
            return f"it ran out of memory in {format_bytes(room)} on this card before", need
        if need is None or measured == Verdict.FITS or (self._is_cuda and other_allocator()):
            return "", need
        # Only the hopeless is skipped: a prediction, which may be wrong, never takes the place of the dry run.
        if verdict(prediction, room) == Verdict.HOPELESS:
            return f"it is predicted to need {format_bytes(need)}, and there are {format_bytes(room)}", need
        return self._doubt(config.model, need), need

    def refusal(self, above: Config, config: Config) -> str:
        """Why these settings, one step below those, are not to be tried, whatever the room; empty where they may be."""
        return (
            refusals.refusal(self._predictor.networks, above, config)
            or precision_refusal(self.capacity.device, config.trainer.precision)
            or self._no_step(above, config)
        )

    def _no_step(self, above: Config, config: Config) -> str:
        room = self.capacity.room()
        return "" if room is None else refusals.no_step(self._planner, above, config, room)

    def _doubt(self, model: ModelConfig, need: int) -> str:
        for failed, predicted, room in self._failed:
            if need >= predicted:
                least = format_bytes(predicted)
                return f"it is predicted to need {format_bytes(need)}, no less than a rung that failed ({least})"
            # A failure that was predicted shows that the predictions for its model need no margin.
            if failed == model and predicted > room and need > room:
                least = format_bytes(room)
                return f"it is predicted to need {format_bytes(need)}, and a failure in {least} was foretold"
        return ""

    def needed(self, config: Config) -> int | None:
        """The least bytes that these settings are predicted to fit in, where that was predicted."""
        prediction = self._predictor.recalled(self._planner.planned(config, self.capacity.room()))
        return None if prediction is None else prediction.min_capacity_bytes

    def timeline(self, config: Config) -> Timeline | None:
        """Trace the memory of an update under these settings; None where that is not possible."""
        with suppress(TraceError):
            return timeline(self._predictor.spec_of(config))
        return None

    def seconds(self, config: Config) -> float | None:
        """Predicted time of an update with all activations kept; None without a card, or of an unknown network."""
        with suppress(TraceError):
            return self._planner.seconds(without_savers(config)) if self._is_cuda else None
        return None

    def added_time(self, config: Config) -> float | None:
        """Predicted time of an update over that with all activations kept on the device; None where they are."""
        is_longer = ":" in config.trainer.recompute or config.trainer.offload
        return self._planner.added_time(config) if is_longer else None

    def kept_by_exact(self, cfg: DictConfig, used: Config) -> str:
        """As `exact.kept`, of a run that trained with the settings `used`."""
        return exact.kept(cfg, used, self._planner, self.capacity.room(), lambda _, *steps: self.refusal(*steps))

    def may_keep_model(self, config: Config) -> bool:
        """Whether there is room for more than weights and gradients, which are there whatever else is saved."""
        room = self.capacity.room()
        return room is None or 2 * self._predictor.networks.weights_bytes(config) < room

    def largest_batch(self, config: Config, most: int) -> int | None:
        """The largest batch size up to `most` that is predicted to fit; None where that is not known."""
        room = self.capacity.room()
        if room is None or (self._is_cuda and other_allocator()):
            return None
        return largest_batch(self._planner, config, room, most)[0]

    def learn(self, config: Config, entry: Attempt) -> None:
        """Remember how an attempt ended, on a CUDA card from one run to the next."""
        room = self.capacity.room()
        if room is None or entry.phase == ELSEWHERE:
            return
        if entry.outcome == Outcome.OOM and entry.predicted_bytes is not None:
            self._failed.append((config.model, entry.predicted_bytes, room))
        if not self._is_cuda:
            return
        known = self._measurement(config)
        if entry.outcome == Outcome.FITS and entry.peak_reserved_bytes is not None:
            peaks = (entry.peak_allocated_bytes or 0, entry.peak_reserved_bytes)
            # Kernels that the dry run has loaded take from the room: it fitted in what there was before.
            self._keep(config, known.fitted(max(room, self._room_before), *peaks))
            free, total = torch.cuda.mem_get_info(self.capacity.device)
            self._predictor.cache.keep_context(self._card, total - free - self.capacity.usage().reserved)
        elif entry.outcome == Outcome.OOM and verdict(self._predictor.predict(config), room) != Verdict.FITS:
            # Had it been predicted to fit, another process might be the cause.
            self._keep(config, known.failed(room))

    def earlier_dry_run(self, config: Config) -> Measurement | None:
        """What a dry run of these settings came to on this card earlier, in no more room than there is now."""
        room = self.capacity.room()
        if room is None:
            return None
        self._room_before = room
        known = self._measurement(config)  # which, unlike a prediction, takes the place of a dry run
        return known if known.verdict(room) == Verdict.FITS else None

    def forget(self, config: Config) -> None:
        """Forget that these settings fitted, for they did not in training."""
        if self._is_cuda:  # in what room they failed before is still true
            self._keep(config, Measurement(oom_in=self._measurement(config).oom_in))

    def begin(self) -> None:
        """Begin a new descent."""
        self._failed.clear()  # what failed in the last one may fit again, as other processes end
        self._room_before = 0

    def _measurement(self, config: Config) -> Measurement:
        if not self._is_cuda:  # a simulated card measures nothing that its model does not predict
            return Measurement()
        return self._predictor.cache.get(Measurement, self._key(config)) or Measurement()

    def _keep(self, config: Config, measurement: Measurement) -> None:
        self._predictor.cache.keep(self._key(config), measurement)

    def _key(self, config: Config) -> Key:
        return {**self._predictor.key(config), "card": self._card}
