"""What Hydra composes is composed once in a process: it takes 50 ms, a fifth of a small training."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from adaptive_trainer.config.overrides import config_dir

_compose = hydra.compose
_known: dict[tuple[str, ...], bytes] = {}


def without_report(overrides: Sequence[str]) -> list[str]:
    is_left = any(text.startswith(("report=", "task=")) for text in overrides)  # other tasks write none, or refuse it
    return [*(() if is_left else ("report=false",)), *overrides]


def compose(
    config_name: str | None = None,
    overrides: list[str] | None = None,
    return_hydra_config: bool = False,
    strict: bool | None = None,
) -> DictConfig:
    """`hydra.compose`, which remembers what it made of the package's own files; others may have changed since.

    Without a report, which takes longer than a small training, where a test does not ask for one.
    """
    overrides = without_report(overrides or ()) if config_name == "config" else list(overrides or ())
    key = (str(config_name), *overrides)
    folders = [source.path for source in GlobalHydra.instance().config_loader().get_search_path().get_path()]
    own = folders == ["pkg://hydra.conf", config_dir(), "structured://"]
    if return_hydra_config or not own or any("searchpath" in text for text in key):
        return _compose(config_name, overrides, return_hydra_config, strict)
    if key not in _known:
        _known[key] = pickle.dumps(_compose(config_name, overrides))
    found: DictConfig = pickle.loads(_known[key])
    return found


def remember() -> None:
    hydra.compose = compose
