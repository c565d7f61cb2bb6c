"""How images are normalised, cropped and resampled: as a network's pretrained weights expect, unless the user says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from adaptive_trainer.config.schema import USUAL, Config, ModelConfig, with_usual
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.models.zoo import TORCHVISION, build_model, outline

Ladder = Sequence[Rung[Config]]


def own(model: ModelConfig) -> dict[str, Any] | None:
    """`data.mean`, `std`, `crop_pct`, `crop_mode` and `interpolation` that a network's pretrained weights expect.

    By its configuration alone, without its weights. None where there is none.
    """
    return _own(model.name, json.dumps(model.kwargs, sort_keys=True, default=str))  # a key that can be hashed


@functools.lru_cache(maxsize=256)  # every rung of every stage asks
def _own(name: str, kwargs: str) -> dict[str, Any] | None:
    given = json.loads(kwargs)
    if name.startswith(TORCHVISION):
        return _of_torchvision(name.removeprefix(TORCHVISION))
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg, resolve_pretrained_cfg

    if ":" not in name and get_pretrained_cfg(name) is not None:
        how = {key: given.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
        known = resolve_pretrained_cfg(name, **how).to_dict()  # type: ignore[no-untyped-call]
    else:  # of a hub or a folder, or an old name: timm says it with the network
        known = getattr(outline(ModelConfig(name=name, kwargs=given), 2), "pretrained_cfg", None)
    if not known:
        return None
    data: dict[str, Any] = resolve_data_config(pretrained_cfg=known)  # type: ignore[no-untyped-call]
    found = {key: value for key, value in data.items() if key in USUAL}
    found |= {key: [float(part) for part in found[key]] for key in ("mean", "std")}
    # The few that pad images to a square (border) are given the whole image too, without the padding.
    return {**found, "crop_mode": "center" if found["crop_mode"] == "center" else "squash"}


def _of_torchvision(name: str) -> dict[str, Any] | None:
    from torchvision.models import get_model_weights

    how = get_model_weights(name).DEFAULT.transforms()
    share = how.crop_size[0] / how.resize_size[0]
    found = {"mean": list(how.mean), "std": list(how.std), "crop_pct": share, "interpolation": how.interpolation.value}
    return {**found, "crop_mode": "center"}


def settled(
    ladder: Ladder, make_model: Callable[[ModelConfig, int], nn.Module], saved: dict[str, Any] | None = None
) -> tuple[Rung[Config], ...]:
    """The ladder with every null of these settings filled in, for each rung by its own network.

    Args:
        make_model: what makes the networks; of those of the caller's own nothing is known.
        saved: settings in the checkpoint that the run goes on from, whose network keeps what it had.
    """

    def filled(config: Config) -> Config:
        known = _kept(config.model, saved)
        if known is None and config.model.pretrained and make_model is build_model:
            known = own(config.model)
        nulls = {key: value for key, value in (known or {}).items() if getattr(config.data, key) is None}
        return replace(config, data=with_usual(replace(config.data, **nulls)))

    return tuple(replace(rung, settings=filled(rung.settings)) for rung in ladder)


def _kept(model: ModelConfig, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a resumed run had; None where that is not known, for it was another network's."""
    if saved is None:
        return None
    before = saved["data"]
    if before.get("crop_pct") is None:  # of a time when every network was given the usual
        return {key: usual if before.get(key) is None else before[key] for key, usual in USUAL.items()}
    return {key: before[key] for key in USUAL} if saved["model"] == asdict(model) else None


def remark(config: Config, make_model: Callable[[ModelConfig, int], nn.Module]) -> str:
    """Say how images are prepared for a pretrained network; empty where it is not pretrained."""
    if not config.model.pretrained:
        return ""
    name, used = config.model.name, {key: getattr(config.data, key) for key in USUAL}
    known = own(config.model) if make_model is build_model else None
    if config.data.transforms == "none":
        return f"images are not normalised: data.transforms=none; the weights of {name} expect {_text(known or used)}"
    text = f"images are prepared with {_text(used)}"
    if known is None:
        return f"{text}: it is not known what the weights of the network expect; set what differs"
    others = {key: value for key, value in known.items() if _text({key: value}) != _text({key: used[key]})}
    text += f", and the weights of {name} expect {_text(others)}" if others else f", as the weights of {name} expect"
    if config.data.cache != "none" and used["interpolation"] != USUAL["interpolation"]:
        text += f"; data.cache={config.data.cache} resamples {USUAL['interpolation']} all the same"
    return text


def _text(settings: dict[str, Any]) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(f'{part:.4g}' for part in value)}]"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return " ".join(f"data.{key}={plain(value)}" for key, value in settings.items())
