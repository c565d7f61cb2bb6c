"""`predict`: what a recipe, or a network of your own, will need, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import Config, MemoryConfig
from adaptive_trainer.config.validate import check
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.zoo import check_name
from adaptive_trainer.planning.cache import PlanCache
from adaptive_trainer.planning.concrete import predicted
from adaptive_trainer.planning.device_spec import DeviceSpec, spec_of
from adaptive_trainer.planning.own_network import OptimizerOrFactory, predict_network
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.prediction.estimator import Prediction
from adaptive_trainer.utils.files import default_folder

OF_A_NETWORK = ("micro_batch_size", "loss", "precision", "channels_last", "recompute", "limit")


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
            for each sample), `precision` ("fp32", "bf16", "fp16"), `channels_last`, `recompute` ("auto": as little as
            makes it fit, "most": the least memory, ...; by default the network is as it was given) and `limit` (what it
            is to fit in, as `memory.limit`; by default the device).

    Returns:
        Sizes in bytes, the plan of recomputation and the time that it adds. Where the update cannot be traced they are
        None and `reason` says why.

    Raises:
        ConfigError: settings, shape, precision or device that make no sense.
        ModelError: settings with a model that neither timm nor torchvision knows.
    """
    if isinstance(what, nn.Module):
        if unknown := sorted(set(settings) - set(OF_A_NETWORK)):
            allowed = ", ".join(OF_A_NETWORK)
            raise ConfigError(f"predict knows no {', '.join(unknown)}; for a network there are {allowed}")
        spec = _device_spec(device or "auto", settings.pop("limit", None))
        return predict_network(what, optimizer, input_shape, spec, **settings)
    if not isinstance(what, DictConfig | Config):
        raise ConfigError(
            f"predict takes settings (compose_config([...])) or a network, and was given a {type(what).__name__}"
        )
    if optimizer is not None or input_shape or settings:
        raise ConfigError("optimizer, input shape and further settings are for a network; settings of a run say it all")
    return _predict_settings(typed(what) if isinstance(what, DictConfig) else what, device)


def _predict_settings(config: Config, device: str | torch.device | None) -> Prediction:
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
