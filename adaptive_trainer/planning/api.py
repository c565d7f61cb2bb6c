"""`predict`: what a recipe, or a network of your own, will need, for scripts and notebooks."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import PRECISIONS, Config, MemoryConfig, TrainerConfig
from adaptive_trainer.config.validate import check
from adaptive_trainer.data.position import micro_batches
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.savers.recompute import NONE, planned
from adaptive_trainer.models.zoo import check_name
from adaptive_trainer.planning.cache import Key, PlanCache
from adaptive_trainer.planning.concrete import predicted
from adaptive_trainer.planning.device_spec import DeviceSpec, spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.planning.refusals import check_recomputation
from adaptive_trainer.prediction.estimator import Prediction
from adaptive_trainer.prediction.tracer import TraceSpec
from adaptive_trainer.utils.files import default_folder

OF_A_NETWORK = ("micro_batch_size", "loss", "precision", "channels_last", "recompute", "limit")
OptimizerOrFactory = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]


@overload
def predict(what: Config | DictConfig, /, *, device: str | torch.device | None = None) -> Prediction: ...
@overload
def predict(
    what: nn.Module,
    optimizer: OptimizerOrFactory,
    input_shape: Sequence[int],
    /,
    *,
    micro_batch_size: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    precision: str = "fp32",
    channels_last: bool = False,
    recompute: str | None = None,
    limit: str | float | None = None,
    device: str | torch.device | None = None,
) -> Prediction: ...
def predict(
    what: Any,
    optimizer: Any = None,
    input_shape: Sequence[int] = (),
    /,
    *,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Prediction:
    """The bytes that training will take, found without a GPU and without any memory of one.

        predict(compose_config(["model.name=resnet50"]), device="rtx2060")
        predict(model, torch.optim.AdamW, (24, 3, 224, 224), device="cuda")
        predict(model, torch.optim.AdamW, (24, 3, 224, 224), recompute="auto", limit="4GiB")

    Args:
        what: the settings of a run, or a network; a network is left as it is.
        optimizer: of a network: one that holds its parameters, or what makes one from parameters.
        input_shape: of a network: the images of one update, samples first, such as (24, 3, 224, 224).
        device: "auto" or "cuda" (this machine's card, or where there is none a common one), "cpu" (what a simulated
            card counts), or a card of `configs/card/` such as "rtx2060"; None is what the settings say, else "auto".
        settings: of a network: `micro_batch_size` (samples of one forward and backward), `loss` (of output and a label
            for each sample), `precision` ("fp32", "bf16", "fp16"), `channels_last`, `recompute` (as
            `trainer.recompute`: "auto" is as little as makes it fit, "most" the least memory; by default the network
            is as it was given) and `limit` (as `memory.limit`: what it is to fit in; by default the device).

    Returns:
        Sizes in bytes; where the update cannot be traced they are None and `reason` says why. `plan` is what is
        recomputed, which `recompute(model, plan)` does, and `added_time` what that costs.

    Raises:
        ConfigError: settings, shape, precision or device that make no sense.
        ModelError: settings with a model that neither timm nor torchvision knows.
    """
    if isinstance(what, nn.Module):
        if unknown := sorted(set(settings) - set(OF_A_NETWORK)):
            allowed = ", ".join(OF_A_NETWORK)
            raise ConfigError(f"predict knows no {', '.join(unknown)}; for a network there are {allowed}")
        spec = _device_spec(device or "auto", settings.pop("limit", None))
        return _predict_network(what, optimizer, input_shape, spec, **settings)
    if not isinstance(what, DictConfig | Config):
        raise ConfigError(
            f"predict takes settings (compose_config([...])) or a network, and was given a {type(what).__name__}"
        )
    if optimizer is not None or input_shape or settings:
        raise ConfigError("optimizer, input shape and further settings are for a network; settings of a run say it all")
    config = typed(what) if isinstance(what, DictConfig) else what
    check(config)
    check_name(config.model.name)  # here a mistake: a Predictor would give it as a reason
    spec = _device_spec(device) if device is not None else spec_of(config)
    planner = Planner(Predictor(spec, cache=PlanCache(default_folder())))
    return predicted(planner, config, spec.capacity)[1]


def _device_spec(device: str | torch.device, limit: str | float | None = None) -> DeviceSpec:
    name, memory = str(device), MemoryConfig(limit)
    if name.split(":")[0] in ("auto", "cpu", "cuda"):
        return spec_of(Config(device=name, memory=memory))
    return spec_of(Config(card=typed(compose_config([f"card={name}"])).card, memory=memory))


class _NetworkPredictor(Predictor):
    """Predicts a network of the caller's own, of which settings decide nothing but what is recomputed.

    Args:
        make: makes a copy of the network without data.
        traced: gives what is traced, from what makes the network.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        make: Callable[[], nn.Module],
        traced: Callable[[Callable[[], nn.Module]], TraceSpec],
    ) -> None:
        super().__init__(spec, make_model=lambda *_: make())
        self._traced = traced

    def key(self, config: Config) -> Key:
        """What is recomputed; all else is the same."""
        return {"recompute": config.trainer.recompute}

    def _spec(self, config: Config) -> TraceSpec:
        return self._traced(lambda: self.networks.build(config))


def _predict_network(
    model: nn.Module,
    optimizer: OptimizerOrFactory,
    input_shape: Sequence[int],
    device: DeviceSpec,
    *,
    micro_batch_size: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    precision: str = "fp32",
    channels_last: bool = False,
    recompute: str | None = None,
) -> Prediction:
    _check_sizes(input_shape, micro_batch_size)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}")
    samples, *shape = input_shape

    def traced(make: Callable[[], nn.Module]) -> TraceSpec:
        return TraceSpec(
            make,
            lambda network: _optimizer_of(network, model, optimizer),
            tuple(shape),
            tuple(micro_batches(samples, micro_batch_size or samples, False)),
            loss=loss,
            precision=precision,
            channels_last=channels_last,
            cuda=device.cuda,
        )

    if recompute is None:
        recompute = str(planned(model) or NONE)
    config = Config(trainer=TrainerConfig(recompute=recompute))
    predictor = _NetworkPredictor(device, lambda: _without_data(model), traced)
    check(config)
    check_recomputation(predictor.networks, config)
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    found = predicted(Planner(predictor), config, device.capacity)[1]
    # What is traced is a copy: a gradient here comes of a loss or a network that holds on to the original.
    changed = [(parameter, gradient) for parameter, gradient in before if parameter.grad is not gradient]
    for parameter, gradient in changed:
        parameter.grad = gradient
    if changed:
        return Prediction(seconds=found.seconds, reason="the loss or the network uses these very parameters")
    return found


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
