"""What a network of the caller's own will need: a copy without data is traced, and the network stays as it is."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from adaptive_trainer.config.schema import PRECISIONS, Config, TrainerConfig
from adaptive_trainer.config.validate import check
from adaptive_trainer.data.position import micro_batches
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.recomputing.following import plan_in
from adaptive_trainer.planning.cache import Key
from adaptive_trainer.planning.concrete import predicted
from adaptive_trainer.planning.device_spec import DeviceSpec
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.planning.refusals import check_recomputation
from adaptive_trainer.prediction.estimator import Prediction
from adaptive_trainer.prediction.tracer import TraceSpec

OptimizerOrFactory = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]


def predict_network(
    model: nn.Module,
    optimizer: OptimizerOrFactory,
    input_shape: Sequence[int],
    device: DeviceSpec,
    *,
    recompute: str | None = None,
    **settings: Any,
) -> Prediction:
    """As `api.predict`, for a device.

    Raises:
        ConfigError: shape, precision or plan make no sense.
    """
    predictor = NetworkPredictor(device, model, optimizer, input_shape, **settings)
    asked = str(plan_in(model)) if recompute is None else recompute
    config = Config(trainer=TrainerConfig(recompute=asked))
    check(config)
    check_recomputation(predictor.networks, config)
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    _, found = predicted(Planner(predictor), config, device.capacity)
    # What is traced is a copy: a gradient here comes of a loss or a network that holds on to the original.
    changed = [(parameter, gradient) for parameter, gradient in before if parameter.grad is not gradient]
    for parameter, gradient in changed:
        parameter.grad = gradient
    if changed:
        return Prediction(seconds=found.seconds, reason="the loss or the network uses these very parameters")
    return found


class NetworkPredictor(Predictor):
    """Predicts a network of the caller's own, of which settings decide nothing but what is recomputed.

    Args:
        model, optimizer, input_shape: as `api.predict`, and what follows.

    Raises:
        ConfigError: shape or precision make no sense.
    """

    def __init__(
        self,
        device: DeviceSpec,
        model: nn.Module,
        optimizer: OptimizerOrFactory,
        input_shape: Sequence[int],
        *,
        micro_batch_size: int | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
        precision: str = "fp32",
        channels_last: bool = False,
    ) -> None:
        _check_sizes(input_shape, micro_batch_size)
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}")
        super().__init__(device, make_model=lambda *_: _without_data(model))
        samples, *shape = input_shape
        self._traced = TraceSpec(
            lambda: _without_data(model),
            lambda network: _optimizer_of(network, model, optimizer),
            tuple(shape),
            tuple(micro_batches(samples, micro_batch_size or samples, False)),
            loss=loss,
            precision=precision,
            channels_last=channels_last,
            cuda=device.cuda,
        )

    def key(self, config: Config) -> Key:
        """What is recomputed; all else is the same."""
        return {"recompute": config.trainer.recompute}

    def spec_of(self, config: Config) -> TraceSpec:
        """The update, with what is recomputed."""
        return replace(self._traced, make_model=lambda: self.networks.build(config))


def _check_sizes(input_shape: Sequence[int], micro_batch_size: int | None) -> None:
    sizes = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if len(sizes) < 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ConfigError(
            f"the input shape {input_shape} is none: samples first, then one sample's, such as (24, 3, 224, 224)"
        )
    if micro_batch_size is not None and not 1 <= micro_batch_size <= sizes[0]:
        raise ConfigError(f"micro_batch_size={micro_batch_size} must be from 1 to the {sizes[0]} samples of the input")


def _without_data(model: nn.Module) -> nn.Module:
    """A copy of the network with its parameters and buffers on meta."""
    # What `deepcopy` takes for copied already: so weights are never there twice.
    copies: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    copies |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, copies)


def _optimizer_of(network: nn.Module, model: nn.Module, optimizer: OptimizerOrFactory) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        return optimizer(network.parameters())
    copies: dict[int, Any] = dict(zip(map(id, model.parameters()), network.parameters(), strict=True))
    if not any(id(p) in copies for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError("the optimizer holds none of the network's parameters; make it from model.parameters()")
    copies[id(optimizer.state)] = defaultdict(dict)  # what it has learned is as large as what it will learn
    return copy.deepcopy(optimizer, copies)
