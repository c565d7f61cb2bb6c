"""The networks that settings stand for, and what is known of them without any memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.ladder.resolve import with_plan
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.models.recomputing.plan import NONE
from adaptive_trainer.models.savers import apply_savers
from adaptive_trainer.models.zoo import build_model, outline, without_memory, without_weights
from adaptive_trainer.utils.random import same_random_numbers

ASSUMED_CLASSES = 10  # where model.num_classes is left to the data, of which a plan opens folders alone

ModelFactory = Callable[[ModelConfig, int], nn.Module]


class Networks:
    """Builds networks as training does, by name or by `make`, a factory of the user's own."""

    def __init__(self, make: ModelFactory | None, num_classes: int | None) -> None:
        self.is_own = make not in (None, build_model)
        self._make = make or build_model
        self._num_classes = num_classes
        self._outlines: dict[str, nn.Module | None] = {}

    def classes(self, config: Config) -> int:
        """Width of the network's head."""
        weights = config.trainer.class_weights  # there is one for each
        known = len(weights) if isinstance(weights, list) else ASSUMED_CLASSES
        return config.model.num_classes or self._num_classes or known

    def key(self, config: Config) -> dict[str, Any]:
        """Everything that tells networks apart; their first weights do not."""
        return {**asdict(config.model), "pretrained": False, "weights": None, "num_classes": self.classes(config)}

    def build(self, config: Config) -> nn.Module:
        """Build the network on the default device, for its shapes alone."""
        on_meta = torch.get_default_device().type == "meta"
        outlined = outline(config.model, self.classes(config)) if on_meta and not self.is_own else None
        if outlined is not None:
            model = copy.deepcopy(outlined)  # faster than making it
        else:
            model = self._make(without_weights(config.model), self.classes(config))  # downloads nothing
        apply_savers(model, config.trainer)
        return model

    def outline(self, config: Config) -> nn.Module | None:
        """The network without memory, not to be changed; None where it cannot be made so."""
        if not self.is_own:
            return outline(config.model, self.classes(config))
        key = repr(self.key(config))
        if key not in self._outlines:
            plain = with_plan(config, NONE)  # which may still be planned
            self._outlines[key] = without_memory(lambda: self.build(plain))
        return self._outlines[key]

    def outline_or_network(self, config: Config) -> nn.Module:
        """The outline; the network itself where there is none."""
        model = self.outline(config)
        if model is None:
            with same_random_numbers():  # a plan must not change the weights that training draws
                model = self.build(config)
        return model

    def has_batch_norm(self, config: Config) -> bool:
        """Whether the network has layers that cannot train on a single sample."""
        return has_batch_norm(self.outline_or_network(config))

    def weights_bytes(self, config: Config) -> int:
        """What the weights alone take, known at once; 0 where they cannot be counted without memory."""
        with suppress(Exception):  # factories of the user's own may raise anything; the dry run says it
            model = self.outline(config)
            return 0 if model is None else sum(p.nbytes for p in model.parameters())
        return 0
