"""A trained network, taken from its checkpoint with all that its use needs: classes, preprocessing, recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from adaptive_trainer.checkpoints import checkpoint, packing
from adaptive_trainer.checkpoints.contents import OF_A_MODEL, checked
from adaptive_trainer.checkpoints.trust import LOADS, check_model
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import USUAL, Config, DataConfig, ModelConfig
from adaptive_trainer.data.images.transforms import build_transform, to_rgb
from adaptive_trainer.data.splitting import Split
from adaptive_trainer.errors import CheckpointError, explained
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.networks import ModelFactory
from adaptive_trainer.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and what it was trained with.

    Attributes:
        path: of its checkpoint.
        network: on the CPU, in evaluation mode; maps images (N, 3, S, S) to scores (N, classes).
        classes: the name of each score; its number where the checkpoint has no names.
        config: the settings of the rung that trained it.
        split: how its validation images were held out; None where that is not known, or they were a set of their own.
    """

    path: Path
    network: nn.Module
    classes: tuple[str, ...]
    config: Config
    split: Split | None = None

    @property
    def data(self) -> DataConfig:
        """How images are prepared: as in the evaluations of its training, from files."""
        data = self.config.data
        # stored images are resampled so, whatever the settings say
        stored = {} if data.cache == "none" else {"cache": "none", "interpolation": USUAL["interpolation"]}
        return replace(data, **stored)

    def run_as(self, config: Config) -> Config:
        """The settings of its training, on the device, with the memory, batch and data workers of others."""
        data, batch = config.data, config.trainer.eval_batch_size
        return replace(
            self.config,
            device=config.device,
            memory=config.memory,
            trainer=replace(self.config.trainer, eval_batch_size=batch),
            data=replace(self.config.data, num_workers=data.num_workers, max_pixels=data.max_pixels),
        )

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image, or a tensor (C, H, W) of bytes or floats from 0 to 1, to the input (3, S, S)."""
        from torchvision.transforms import (
            Compose,
        )  # that of v2 is a module, which a network would take for a part of it

        chain: list[Callable[[Any], Any]] = [to_rgb, build_transform(self.data, self.data.image_size, training=False)]
        return Compose(chain)  # type: ignore[no-any-return]

    @property
    def recipe(self) -> Recipe:
        """What it was trained with, in short."""
        return replace(recipe(self.config), num_classes=len(self.classes))


def load_model(path: str | Path, model: ModelFactory | None = None) -> nn.Module:
    """The trained network of a checkpoint (`checkpoints/best.pt`), on the CPU, ready to be used.

    It carries, unless it has attributes of these names itself, `classes` (the names of its scores), `transform` (makes
    its input of a PIL image, as in training) and `recipe` (what it was trained with):

        network = load_model("best.pt")
        scores = network(network.transform(Image.open("photo.jpg"))[None])
        print(network.classes[scores.argmax()])

    Args:
        model: the factory that the Trainer was given, if any.

    Raises:
        CheckpointError: there is none, or it is damaged, or something else.
    """
    found = load(path, model)
    for name in ("classes", "transform", "recipe"):
        if not hasattr(found.network, name):  # its own, which its code may need
            setattr(found.network, name, getattr(found, name))
    return found.network


def load(path: str | Path, model: ModelFactory | None = None) -> Trained:
    """A trained network and what it was trained with; the arguments and errors are those of `load_model`."""
    path = Path(path).expanduser()
    content = read(path)
    # all weights are in the file
    settings = ModelConfig(**{**content["config"]["model"], "pretrained": False, "weights": None})
    # nor does timm load what the kwargs point to
    settings.kwargs = {key: value for key, value in settings.kwargs.items() if key not in LOADS}
    if model is None:  # a factory is the caller's own code, and decides itself what it makes of the name
        check_model(asdict(settings), path)
    network = (model or build_model)(settings, content["num_classes"])

    def misfit(error: Exception) -> CheckpointError:
        name, advice = settings.name, "give load_model the factory that the Trainer was given"
        if model is not None:
            name, advice = f"what {getattr(model, '__name__', 'the factory')} makes", "is it the one that was trained?"
        return CheckpointError(f"{path} does not fit {name} ({packing.misfit(error)}); {advice}")

    with explained(misfit, (RuntimeError, AttributeError)):
        weights = content["ema"] or content["model"]
        packing.make_buffers(network, weights, content.get("made_buffers", ()))
        network.load_state_dict(weights)
    config = typed(OmegaConf.merge(OmegaConf.structured(Config), content["config"]))  # type: ignore[arg-type]
    split = content.get("split")
    return Trained(path, network.eval(), class_names(content), config, split and Split(**split))


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, of which a network can be made.

    Raises:
        CheckpointError: there is none, or it is damaged, or something else.
    """
    content = checkpoint.load(path)
    return checked(content, path, [*OF_A_MODEL, *(key for key in ("classes", "split") if key in content)])


def class_names(content: dict[str, Any]) -> tuple[str, ...]:
    """The name of each score, or its number."""
    names = content.get("classes", [])
    return (*names, *(str(number) for number in range(len(names), content["num_classes"])))
