"""Networks by name from timm and torchvision."""

from __future__ import annotations

import difflib
import functools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.errors import ModelError, explained
from adaptive_trainer.utils.random import same_random_numbers
from adaptive_trainer.utils.screen import unlogged

TORCHVISION = "torchvision/"
TIMM_HELPERS = "timm.models._helpers"  # says that there is no checkpoint, and raises
CHECKPOINT = "checkpoint_path"  # of model.kwargs, which timm loads as it is
WITH_AUXILIARY_HEAD = ("googlenet", "inception_v3")  # they return a tuple in training unless told otherwise
NETWORK_PACKAGES = ("httpx", "httpcore", "huggingface_hub", "requests", "urllib3")
NETWORK_TIMEOUT = 20.0  # seconds of silence
HUB_TIMEOUT = 10.0  # seconds until the hub counts as out of reach
NEED_INPUT = (nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish)  # for their gradients, so in place they keep a copy of it


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the network that `config.name` names on the current default device, its head sized to the classes.

    Maps images (N, 3, H, W) to scores (N, num_classes).

    Raises:
        ModelError: the name is unknown, `config.kwargs` do not suit it, or its pretrained weights cannot be had.
    """
    check_name(config.name)
    make = _from_torchvision if config.name.startswith(TORCHVISION) else _from_timm
    with explained(partial(_explain, config)), _impatient_downloads(config), unlogged(TIMM_HELPERS):
        model = make(config, num_classes)
    for module in model.modules():
        if isinstance(module, NEED_INPUT):
            # In training, writing elsewhere takes as much memory as the copy that working in place would make of the
            # input, and less time. In evaluation, where nothing is copied, it takes one activation more.
            module.inplace = False
    return model


def has_pretrained_weights(name: str) -> bool:
    """Whether there are pretrained weights of a network by this name, to be loaded."""
    import timm

    return name.startswith(TORCHVISION) or bool(timm.is_model_pretrained(name))


def _from_timm(config: ModelConfig, num_classes: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(
        config.name, pretrained=config.pretrained, num_classes=num_classes, **config.kwargs
    )
    return model


def _from_torchvision(config: ModelConfig, num_classes: int) -> nn.Module:
    from torchvision.models import get_model

    name = config.name.removeprefix(TORCHVISION)
    kwargs: dict[str, Any] = {}
    if name in WITH_AUXILIARY_HEAD:
        kwargs = {"aux_logits": False, "transform_input": config.pretrained, "init_weights": True}
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **{**kwargs, **config.kwargs})
    if config.pretrained:
        kwargs.pop("init_weights", None)
        learned = get_model(name, weights="DEFAULT", **{**kwargs, **config.kwargs}).state_dict()
        own = model.state_dict()
        fitting = {key: value for key, value in learned.items() if key in own and own[key].shape == value.shape}
        model.load_state_dict(fitting, strict=False)  # all but the head, whose shape follows the classes
    return model


def check_name(name: str) -> None:
    """Refuse a name that neither timm nor torchvision knows, and say the nearest ones.

    Raises:
        ModelError: it is so.
    """
    import timm

    if name.startswith(("hf-hub:", "local-dir:")):
        return
    wanted, (plain, _, tag) = name, name.partition(".")
    if name.startswith(TORCHVISION):
        import torchvision

        known = [TORCHVISION + each for each in torchvision.models.list_models(module=torchvision.models)]
    elif not timm.is_model(plain):
        wanted, known = plain, timm.list_models()
    else:
        known = timm.list_models(f"{plain}.*", pretrained=True) if tag else [name]
    if name in known:
        return
    near = difflib.get_close_matches(wanted, known, n=3)
    near = near or [each for each in known if wanted and wanted.lower() in each][:3]
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(known)}, such as {', '.join(known[:3])}"
    raise ModelError(f"unknown model.name={name}: {hint} (a timm name, or torchvision/NAME)")


def _explain(config: ModelConfig, error: Exception) -> ModelError | None:
    """What the user can do about a failure to build; None where it is none of the user's doing."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(". ")
    package = type(error).__module__.split(".")[0]
    is_missing = isinstance(error, OSError) or package in NETWORK_PACKAGES or "No pretrained weights" in text
    if (path := config.kwargs.get(CHECKPOINT)) and isinstance(error, OSError | RuntimeError | ValueError | KeyError):
        # the second line names the first tensor that does not fit
        why = " ".join(map(str.strip, str(error).splitlines()[:2])).rstrip(". ") or type(error).__name__
        return ModelError(
            f"model.kwargs.{CHECKPOINT}={path} cannot be loaded into {config.name}: "
            f"{'no such file' if isinstance(error, FileNotFoundError) else why}. It needs as many classes "
            "as the data; for other classes leave it out, or load its weights in a factory of your own (model=)"
        )
    if config.pretrained and is_missing:
        return ModelError(
            f"cannot get the pretrained weights of {config.name}: {text}. Use model.pretrained=false, or connect to "
            "the network once so that they are kept in the cache"
        )
    if is_missing and ":" in config.name:
        return ModelError(f"cannot read model.name={config.name}: {text}")
    if config.kwargs and isinstance(error, TypeError | ValueError | AssertionError):
        return ModelError(f"{config.name} does not take model.kwargs={config.kwargs}: {text}")
    return None


@contextmanager
def _impatient_downloads(config: ModelConfig) -> Iterator[None]:
    """Let downloads end when the network is silent, and take a hub's weights from the cache when it does not answer."""
    from huggingface_hub import constants, get_session

    before = socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision's downloads set none of their own
    try:
        if (config.pretrained or ":" in config.name) and not config.name.startswith(TORCHVISION):
            try:  # the hub's own client would try for a minute
                if not constants.HF_HUB_OFFLINE:
                    get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
            except Exception:  # of whatever its client has chosen for the network
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        timeout, constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(timeout)


def outline(config: ModelConfig, num_classes: int) -> nn.Module | None:
    """Build the network on meta, in evaluation mode; None where it cannot be made without memory.

    It is made once for all who ask, and not to be changed.

    Raises:
        ModelError: as `build_model`.
    """
    kwargs = json.dumps(without_weights(config).kwargs, sort_keys=True)
    return _outline(config.name, kwargs, num_classes, torch.get_default_dtype())


@functools.lru_cache(maxsize=16)
def _outline(name: str, kwargs: str, num_classes: int, dtype: torch.dtype) -> nn.Module | None:
    return without_memory(lambda: build_model(ModelConfig(name=name, kwargs=json.loads(kwargs)), num_classes).eval())


def without_weights(config: ModelConfig) -> ModelConfig:
    """Name the same network for shapes alone: nothing is downloaded or read."""
    kwargs = {key: value for key, value in config.kwargs.items() if key != CHECKPOINT}
    return replace(config, pretrained=False, weights=None, kwargs=kwargs)


def without_memory(make: Callable[[], nn.Module]) -> nn.Module | None:
    """Make a network on meta; None where it looks at values while it is built."""
    try:
        with same_random_numbers(), torch.device("meta"):
            return make()
    except RuntimeError:  # so are torch's NotImplementedErrors
        return None
