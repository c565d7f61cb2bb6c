"""A training that starts from the weights of an earlier one (`model.weights`), also with other classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaptive_trainer.checkpoints import packing
from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.errors import CheckpointError, ConfigError, explained, override
from adaptive_trainer.inference.model import class_names, read
from adaptive_trainer.models.zoo import build_model, without_memory, without_weights
from adaptive_trainer.planning.networks import ModelFactory
from adaptive_trainer.utils.random import same_random_numbers


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """What a training starts from.

    Attributes:
        model: the settings of the network that they are for; another one, on a lower rung, starts anew.
        tensors: by their names in the network, on the host.
        made: names of buffers that forward passes have made.
        head: names of what depends on the classes and starts anew.
        data: the settings of `data` that they were trained with.
        text: what is decided, in words.
    """

    model: ModelConfig
    tensors: dict[str, Tensor]
    made: Sequence[str]
    head: frozenset[str]
    data: dict[str, Any]
    text: str

    @property
    def before(self) -> dict[str, Any]:
        """The settings by which images are prepared as they were, as those of a run that goes on."""
        return {"model": asdict(self.model), "data": self.data}

    def put_into(self, network: nn.Module, config: ModelConfig) -> None:
        """Give them to a network that was made by these settings, if they are of such.

        Raises:
            CheckpointError: they do not fit it.
        """
        if config != self.model:
            return

        def misfit(error: Exception) -> CheckpointError:
            return CheckpointError(
                f"model.weights={config.weights} does not fit {config.name} ({packing.misfit(error)}); is "
                "model.kwargs, or what makes the network, as it was?"
            )

        with explained(misfit, (RuntimeError, AttributeError)):
            packing.make_buffers(network, self.tensors, self.made)
            own = network.state_dict()
            network.load_state_dict(self.tensors | {name: own[name] for name in self.head & own.keys()})


def own_weights(config: ModelConfig, classes: Sequence[str], make: ModelFactory = build_model) -> OwnWeights | None:
    """Read the checkpoint that `model.weights` names; None where it names none.

    Its head is taken over where the classes are the same, in the same order; else it starts anew.

    Args:
        classes: of the data, one for each output.
        make: makes the networks.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: it is of another network than `model.name`.
    """
    if config.weights is None:
        return None
    path = Path(config.weights).expanduser()
    content = read(path)
    name, before = content["config"]["model"]["name"], class_names(content)
    if make is build_model and name != config.name:
        raise ConfigError(
            f"model.weights={path} is of {name}, and model.name={config.name}; type {override('model.name', name)} too"
        )
    tensors = content["ema"] or content["model"]
    is_same = before == tuple(classes)
    head = frozenset() if is_same else _head(config, tensors, content["num_classes"], make)
    kept = "its classes are the same" if is_same else "the classes are others, so its last layer starts anew"
    text = f"the network starts from the weights of {path}, and images are prepared as there; {kept}"
    kept_tensors = {key: value for key, value in tensors.items() if key not in head}
    return OwnWeights(config, kept_tensors, content.get("made_buffers", ()), head, content["config"]["data"], text)


def _head(config: ModelConfig, tensors: dict[str, Tensor], num_classes: int, make: ModelFactory) -> frozenset[str]:
    """The names of tensors whose shape depends on the number of classes: they are others in a network with one more."""

    def wider() -> nn.Module:
        return make(replace(without_weights(config), num_classes=None), num_classes + 1)

    network = without_memory(wider)
    if network is None:  # it looks at values while it is made
        with same_random_numbers():
            network = wider()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return frozenset(name for name, tensor in tensors.items() if name in shapes and shapes[name] != tensor.shape)
