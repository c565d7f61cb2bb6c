"""What a resumed run goes on with: the saved settings with what is typed on top, and the saved state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from adaptive_trainer.checkpoints import checkpoint, packing
from adaptive_trainer.checkpoints.contents import OF_A_RUN, checked
from adaptive_trainer.checkpoints.trust import trusted
from adaptive_trainer.config.overrides import asked, names_data, stage_names, with_asked
from adaptive_trainer.config.schema import USUAL, Config, OptimizerConfig
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.splitting import RANDOM, Split
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import CheckpointError, explained
from adaptive_trainer.ladder.resolve import WHOLE
from adaptive_trainer.models.optimizers import kind_of_state
from adaptive_trainer.recipe import in_words
from adaptive_trainer.report import earlier
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.utils.launch import restarts


@dataclass
class Start:
    """What a run begins with.

    Attributes:
        cfg: its settings.
        path: of the checkpoint that it goes on from, or None.
        saved: the content of that checkpoint.
        events: what was decided so far, in words.
    """

    cfg: DictConfig
    path: Path | None = None
    saved: dict[str, Any] | None = None
    events: list[str] = field(default_factory=list)


def start(cfg: DictConfig, output_dir: Path, *, has_data: bool = False) -> Start:
    """Find the run that `resume` means, and put what was typed for this one on top of its settings.

    Args:
        has_data: the data is the caller's, and not what the settings name.

    Raises:
        CheckpointError: the checkpoint, or the settings that were saved, cannot be used; there is no run to go on with,
            and nothing says what a new one would train on.
        ConfigError: what was typed does not suit the saved settings.
    """
    # ranks that torchrun has started anew go on with what they have left
    meant = "auto" if restarts() and (cfg.resume is None or (output_dir / earlier.LAST).exists()) else cfg.resume
    may_begin = has_data or names_data(cfg) or cfg.resume is None
    found = peers().decided(lambda: earlier.find(meant, output_dir, may_begin=may_begin))
    wanted = asked(cfg)
    saved = None if found.checkpoint is None else load(found.checkpoint)
    if saved is not None and found.checkpoint is not None:
        made = trusted(saved["request"], found.checkpoint, cfg)  # not config.yaml: the request travels with its state
    elif found.settings is not None:
        made = trusted(_text_of(found.settings), found.settings, cfg)
    else:
        made = with_asked(cfg.copy(), wanted.overrides, wanted.search_path)
    # what is said of stages goes for the phases that were typed, unless the saved ones took their place
    kept = dict.fromkeys([*(wanted.kept if cfg.phases == made.phases else ()), *asked(made).kept])
    return Start(made, found.checkpoint, saved, [*found.events, *kept])


def _text_of(settings: Path) -> str:
    def unreadable(error: Exception) -> CheckpointError:
        return CheckpointError(f"the settings in {settings} cannot be read: {error}; start anew with resume=null")

    with explained(unreadable, (OSError, UnicodeDecodeError)):
        return settings.read_text(encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that can be trained on.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or holds only a model.
    """
    content = checkpoint.load(path, to_resume=True)
    if "optimizer" not in content and "random" not in content:  # one of the two missing is damage, said below
        raise CheckpointError(f"{path} holds a model only and cannot be trained on; resume from last.pt beside it")
    return checked(content, path, OF_A_RUN)


def check_stages(saved: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse a checkpoint whose stage, or one before it, is none of those with these names.

    Raises:
        CheckpointError: it is.
    """
    # stages behind the saved one may be others now: nothing of them has been trained
    phases = OmegaConf.create(saved["request"]).phases.stages
    before = stage_names(phases) or [WHOLE]
    done = saved["stage"] + 1
    if done > len(before):
        raise CheckpointError(f"the checkpoint is of stage number {done}, and its own settings have {len(before)}")
    if before[:done] != list(names[:done]):
        raise CheckpointError(
            f"the checkpoint is of stage {before[done - 1]}, number {done} of {', '.join(before)}, and the stages are "
            f"{', '.join(names)} now; keep the phases up to there, or start anew with resume=null"
        )


def split_before(saved: dict[str, Any] | None) -> Split | None:
    """How the run of a checkpoint held out its validation set, so that this one does the same, if there is one."""
    if saved is None:
        return None
    if known := saved.get("split"):
        return Split(known["kind"], known["seed"])  # the digest is compared once the samples are known
    return Split(RANDOM, saved["config"]["seed"])  # as all were before checkpoints said it


def check_data(saved: dict[str, Any], data: DataSets) -> None:
    """Refuse a checkpoint that was made with other training samples, as far as can be known, or with other classes.

    Raises:
        CheckpointError: it was.
    """
    advice = "use the same data, or start anew with resume=null"
    # the order of an epoch is a function of the size: with another one, samples would come twice or never
    size, before = len(data.train), saved["position"]["size"]
    if before != size:
        raise CheckpointError(
            f"the checkpoint was made with {before} training samples and there are {size} now; {advice}"
        )
    if saved["classes"] != list(data.classes):
        gone, new = sorted(set(saved["classes"]) - set(data.classes)), sorted(set(data.classes) - set(saved["classes"]))
        what = f"gone {gone}, new {new}" if gone or new else "their order"
        raise CheckpointError(f"the classes are others than those of the checkpoint: {what}; {advice}")
    if data.split is not None and saved.get("split", asdict(data.split)) != asdict(data.split):
        raise CheckpointError(
            "other samples would be held out for validation than in the run of the checkpoint, which has trained on "
            f"some of them; {advice}"
        )


def take_up(saved: dict[str, Any], config: Config, state: TrainState, device: torch.device) -> list[str]:
    """Put a checkpoint into the state of a session under `config`.

    Returns:
        What is to be told: where it goes on, and what is otherwise than before.

    Raises:
        CheckpointError: it belongs to another model or optimizer.
    """
    asked, before = asdict(config), saved["config"]
    was, wanted = before["optimizer"], asked["optimizer"]
    same_name = was["name"] == wanted["name"]  # one that is altered is none that could be looked up
    with_optimizer = same_name and kind_of_state(OptimizerConfig(**was)) == kind_of_state(OptimizerConfig(**wanted))
    # with the same settings the saved groups go on, for some hold more than settings: timm's Adan counts steps there
    lost = packing.unpack(saved, state, device, keep_groups=was != wanted, with_optimizer=with_optimizer)
    told = [
        f"the random numbers of {path} start anew: there is no such generator, or one of another kind" for path in lost
    ]
    if not with_optimizer:
        told.append("the optimizer starts anew: what the checkpoint has of it is of another kind")
    told.append(f"resumed at epoch {state.finished_epochs + 1}, update {state.updates}, rung {saved['rung']}")
    if before["seed"] != asked["seed"]:
        # the position has the seed, by which the rest of this epoch is in order
        told.append(f"seed={asked['seed']} is left out: a resumed run goes on with seed {before['seed']}")
    for group in ("model", "data", "optimizer", "schedule", "trainer"):
        for key, value in asked[group].items():
            then = before[group].get(key)
            is_new = key not in before[group] or (key in USUAL and then is None)  # to the version that saved it
            if then != value and not is_new:
                name = f"{group}.{key}"
                told.append(f"resumed with another {name}: {in_words(name, then)} -> {in_words(name, value)}")
    return told
