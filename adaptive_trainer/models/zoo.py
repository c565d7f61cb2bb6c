"""Networks by name from timm and torchvision, and what the trainer must know about a network before it trains it."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.errors import ModelError
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import put_all, same_random_numbers, states_of
from adaptive_trainer.utils.screen import unlogged

log = logging.getLogger(__name__)

TORCHVISION = "torchvision/"
TIMM_HELPERS = "timm.models._helpers"  # says that there is no checkpoint, and raises
CHECKPOINT = "checkpoint_path"  # of model.kwargs, which timm loads as it is
WITH_AUXILIARY_HEAD = ("googlenet", "inception_v3")  # they return a tuple in training unless told otherwise
NETWORK_PACKAGES = ("httpx", "httpcore", "huggingface_hub", "requests", "urllib3")
NETWORK_TIMEOUT = 20.0  # seconds of silence
HUB_TIMEOUT = 10.0  # seconds until the hub counts as out of reach
CONTAINERS = (nn.Sequential, nn.ModuleList)
LENT = "kept_buffers"  # attribute of a module whose buffers are copies for the time of a second computation
NEED_INPUT = (nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish)  # for their gradients, so in place they keep a copy of it


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The network that `config.name` names, its head sized to the classes, on the current default device.

    Maps images (N, 3, H, W) to scores (N, num_classes).

    Raises:
        ModelError: the name is unknown, `config.kwargs` do not suit it, or its pretrained weights cannot be had.
    """
    check_name(config.name)
    problem = ""
    try:
        with _network_timeout(), _hub_that_answers(config), unlogged(TIMM_HELPERS):
            make = _from_torchvision if config.name.startswith(TORCHVISION) else _from_timm
            return _uncopied(make(config, num_classes))
    except Exception as error:
        problem = _explained(config, error)
        if not problem:
            raise
    raise ModelError(problem)


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


def _uncopied(model: nn.Module) -> nn.Module:
    """Activations that copy their input to work in place write their output elsewhere instead.

    In training this takes as much memory. In evaluation, where nothing is copied, it takes one activation more.
    """
    for module in model.modules():
        if isinstance(module, NEED_INPUT):
            module.inplace = False
    return model


def check_name(name: str) -> None:
    """Raise a ModelError with the nearest names where neither timm nor torchvision knows `name`."""
    import timm

    if name.startswith(("hf-hub:", "local-dir:")):
        return
    if name.startswith(TORCHVISION):
        import torchvision

        known = [TORCHVISION + each for each in torchvision.models.list_models(module=torchvision.models)]
        is_known, plain = name in known, name
    else:
        plain, _, tag = name.partition(".")
        if timm.is_model(plain) and not tag:
            return
        is_known, known = False, timm.list_models()
        if timm.is_model(plain):
            plain, known = name, timm.list_models(f"{plain}.*", pretrained=True)
            is_known = name in known
    if is_known:
        return
    near = difflib.get_close_matches(plain, known, n=3) or [n for n in known if plain and plain.lower() in n][:3]
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(known)}, such as {', '.join(known[:3])}"
    raise ModelError(f"unknown model.name={name}: {hint} (a timm name, or torchvision/NAME)")


def _explained(config: ModelConfig, error: Exception) -> str:
    """What the user can do about a failure to build; empty where it is none of the user's doing."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(". ")
    package = type(error).__module__.split(".")[0]
    is_missing = isinstance(error, OSError) or package in NETWORK_PACKAGES or "No pretrained weights" in text
    if (path := config.kwargs.get(CHECKPOINT)) and isinstance(error, OSError | RuntimeError | ValueError | KeyError):
        why = "no such file" if isinstance(error, FileNotFoundError) else _brief(error)
        return (
            f"model.kwargs.{CHECKPOINT}={path} cannot be loaded into {config.name}: {why}. It needs as many classes "
            "as the data; for other classes leave it out, or load its weights in a factory of your own (model=)"
        )
    if config.pretrained and is_missing:
        return (
            f"cannot get the pretrained weights of {config.name}: {text}. Use model.pretrained=false, or connect to "
            "the network once so that they are kept in the cache"
        )
    if is_missing and ":" in config.name:
        return f"cannot read model.name={config.name}: {text}"
    if config.kwargs and isinstance(error, TypeError | ValueError | AssertionError):
        return f"{config.name} does not take model.kwargs={config.kwargs}: {text}"
    return ""


def _brief(error: Exception) -> str:
    """The first lines, the second of which names the first tensor that does not fit."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(". ") or type(error).__name__


@contextmanager
def _hub_that_answers(config: ModelConfig) -> Iterator[None]:
    """Takes weights from the cache alone where the hub does not answer: its client would try for a minute."""
    from huggingface_hub import constants, get_session

    was_offline = constants.HF_HUB_OFFLINE
    if not was_offline and (config.pretrained or ":" in config.name) and not config.name.startswith(TORCHVISION):
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        except Exception:  # of whatever its client has chosen for the network
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


@contextmanager
def _network_timeout() -> Iterator[None]:
    """Downloads that set no time limit of their own end when the network is silent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def outline(config: ModelConfig, num_classes: int) -> nn.Module | None:
    """The network on meta, in evaluation mode; None where it cannot be made without memory.

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
    """The same network, for shapes alone: nothing is downloaded or read."""
    kwargs = {key: value for key, value in config.kwargs.items() if key != CHECKPOINT}
    return replace(config, pretrained=False, kwargs=kwargs)


def without_memory(make: Callable[[], nn.Module]) -> nn.Module | None:
    """The network that `make` makes, on meta; None where it looks at values while it is built."""
    try:
        with same_random_numbers(), torch.device("meta"):
            return make()
    except RuntimeError:  # so are torch's NotImplementedErrors
        return None


def has_batch_norm(model: nn.Module) -> bool:
    """Whether training the network on a single sample is impossible or senseless, because of BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def checkpoint_activations(model: nn.Module, enable: bool) -> None:
    """Keep only the inputs of blocks for the backward pass and compute the rest again (Chen et al., arXiv 1604.06174).

    Saves most of the activations' memory for about a third more time. timm's networks know their own blocks; of others,
    the modules that stand in an `nn.Sequential` or `nn.ModuleList` are taken. The second computation leaves buffers
    alone: BatchNorm statistics are counted once.
    """
    if not _by_its_own_means(model, enable):
        blocks = list(_blocks(model))
        if enable and not blocks:
            log.warning("%s has no blocks to recompute: trainer.checkpoint_activations saves nothing", _name(model))
        for block in blocks:
            _recompute(block, enable)
    if enable:
        _keep_buffers_when_recomputing(model)


def _by_its_own_means(model: nn.Module, enable: bool) -> bool:
    switch: Callable[[bool], None] | None = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        return False
    try:
        switch(enable)
    except AssertionError:  # timm's way to say that this network has no checkpointing
        return False
    return True


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with parts of their own that stand directly in a plain container, the outermost first."""
    for child in module.children():
        is_container = type(child) in CONTAINERS
        has_parts = next(child.children(), None) is not None and next(child.parameters(), None) is not None
        if type(module) in CONTAINERS and not is_container:
            if has_parts:
                yield child
        else:
            yield from _blocks(child)


def _recompute(block: nn.Module, enable: bool) -> None:
    """Take another forward for the block's, or its own again: its class's, or one that somebody has given it alone."""
    found = block.__dict__.pop("forward", None)
    is_enabled = isinstance(found, functools.partial) and found.func is _recomputed_later
    own = found.args[1] if is_enabled else found
    if enable:
        block.__dict__["forward"] = functools.partial(_recomputed_later, block, own, Belongings({"block": block}))
    elif own is not None:
        block.__dict__["forward"] = own


def recomputes(model: nn.Module) -> bool:
    """Whether activations of a part of it are computed again in the backward pass."""
    own = (module.__dict__.get("forward") for module in model.modules())
    return any(isinstance(forward, functools.partial) and forward.func is _recomputed_later for forward in own)


def _recomputed_later(
    module: nn.Module, own: Callable[..., Any] | None, owned: Belongings, *args: Any, **kwargs: Any
) -> Any:
    forward = own or functools.partial(type(module).forward, module)
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    owned.keep()
    before = states_of(owned.generators.values())
    if before:  # torch draws again only from its own
        kwargs["context_fn"] = lambda: (nullcontext(), _drawing(before))
    return checkpoint(functools.partial(_on_lent_buffers, module, forward), *args, use_reentrant=False, **kwargs)


@contextmanager
def _drawing(states: list[tuple[Any, Any]]) -> Iterator[None]:
    """Generators in these states, and afterwards as they were."""
    now = states_of(generator for generator, _ in states)
    try:
        put_all(states)
        yield
    finally:
        put_all(now)


def _on_lent_buffers(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The block's own forward, which is run again without the block's hooks."""
    kept, lent = dict(module._buffers), _copies(module)
    if lent is None:
        return forward(*args, **kwargs)
    try:
        module._buffers.update(lent)
        return forward(*args, **kwargs)
    finally:
        _give_back(module, kept)


def _keep_buffers_when_recomputing(model: nn.Module) -> None:
    """A module that runs inside a backward pass runs for the second time: it gets copies of its buffers to change."""
    for module in model.modules():
        if module._buffers and _lend_buffers not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_lend_buffers)
            module.register_forward_hook(_take_buffers_back, always_call=True)


def _copies(module: nn.Module) -> dict[str, Tensor | None] | None:
    """Copies of the module's buffers; None where no backward pass is running in this thread."""
    if torch._C._current_graph_task_id() == -1:
        return None
    return {name: None if value is None else value.clone() for name, value in module._buffers.items()}


def _give_back(module: nn.Module, kept: dict[str, Tensor | None]) -> None:
    module._buffers.clear()  # of what the second computation has made
    module._buffers.update(kept)


def _lend_buffers(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    # What an interrupted pass has left is of an earlier update, and must not be taken for this one's.
    module.__dict__.pop(LENT, None)
    kept, lent = dict(module._buffers), _copies(module)  # making copies can run out of memory: nothing is lent then
    if lent is not None:
        module.__dict__[LENT] = kept
        module._buffers.update(lent)


def _take_buffers_back(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    kept = module.__dict__.pop(LENT, None)
    if kept is not None:
        _give_back(module, kept)


def _name(model: nn.Module) -> str:
    return type(model).__name__
