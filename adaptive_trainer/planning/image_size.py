"""Whether a network takes images of a size, found out by running shapes alone."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.errors import ModelError
from adaptive_trainer.models.zoo import TORCHVISION, outline, without_weights
from adaptive_trainer.planning.cache import PlanCache, Size, versions
from adaptive_trainer.utils.files import default_folder


def check_image_size(config: ModelConfig, image_size: int, num_classes: int) -> None:
    """Refuse an image size that the network cannot take, found out without memory in about 0.1 s.

    Raises:
        ModelError: the network refuses the size; also everything that `build_model` raises it for.
    """
    if (channels := config.kwargs.get("in_chans", 3)) != 3:
        raise ModelError(f"model.kwargs.in_chans={channels}: images have 3 channels, grey ones too; leave it out")
    kwargs = json.dumps(without_weights(config).kwargs, sort_keys=True)
    if failure := _failure(config.name, kwargs, image_size, num_classes):
        advice = "" if config.name.startswith(TORCHVISION) else f", or +model.kwargs.img_size={image_size} if it has it"
        raise ModelError(
            f"{config.name} refuses data.image_size={image_size}: {failure}. "
            f"Use data.image_size={_made_for(config)}{advice}, or another model.name"
        )


@functools.lru_cache(maxsize=256)
def _failure(name: str, kwargs: str, image_size: int, num_classes: int) -> str:
    # What an earlier process has seen to be taken is not tried again.
    cache = PlanCache(None if ":" in name else default_folder())  # a hub's and a folder's networks change
    key = {"versions": versions(), "name": name, "kwargs": kwargs, "size": image_size, "classes": num_classes}
    if cache.get(Size, key) is not None:
        return ""
    config = ModelConfig(name=name, kwargs=json.loads(kwargs))
    model = outline(config, num_classes)
    if model is None:  # not to be made without memory: the dry run finds out
        return ""
    failure = failure_at(model, image_size)
    if not failure:
        cache.keep(key, Size())
    # One that fails at the size it was made for fails for another reason than the size.
    return "" if failure and failure_at(model, _made_for(config)) else failure


def _made_for(config: ModelConfig) -> int:
    import timm

    given = config.kwargs.get("img_size", config.kwargs.get("image_size"))
    if isinstance(given, int):
        return given
    if config.name.startswith(TORCHVISION):  # which does not say
        return 224
    known = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    return 224 if known is None else int(known.input_size[-1])


@torch.no_grad()
def failure_at(model: nn.Module, image_size: int) -> str:
    """The first line of what a forward pass on shapes alone fails with; empty when it passes."""
    try:
        unused = copy.deepcopy(model)  # some networks keep tensors of the size that they have seen
        with _PlainBatchNorm():  # type: ignore[no-untyped-call]
            unused(torch.empty(2, 3, image_size, image_size, device="meta"))
    except Exception as error:  # models refuse sizes with every kind of error
        return str(error).splitlines()[0].rstrip(".! ") if str(error) else type(error).__name__
    return ""


class _PlainBatchNorm(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # It keeps the shape, which PyTorch finds out in more time than all else takes.
        if func is torch.ops.aten.native_batch_norm.default:
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        return func(*args, **(kwargs or {}))
