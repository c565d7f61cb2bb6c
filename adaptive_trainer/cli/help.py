"""`-h`: what the program is, the commands that one needs, and what can be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

from omegaconf import OmegaConf

from adaptive_trainer import __version__
from adaptive_trainer.config.overrides import config_dir
from adaptive_trainer.utils.launch import COMMAND
from adaptive_trainer.utils.screen import width

ABOUT = (
    f"adaptive_trainer {__version__} trains image classifiers in PyTorch. Where GPU memory runs out, it undoes the "
    "update, goes one rung down a ladder of settings, and trains on."
)
COMMANDS = (
    ("try it, on handwritten digits that need no download", ""),
    ("train on photos in photos/CLASS/", "data=imagefolder data.root=photos trainer.epochs=10"),
    ("find the largest batch that fits", "trainer.batch_size=max"),
    ("fit by recomputation, which costs time alone", "ladder=exact"),
    ("go on after a stop, a kill or a crash", "resume=auto"),
    ("see what will fit, also on a card that is not here", "task=plan card=rtx2060"),
    ("see what on this machine stands in the way", "task=doctor"),
    ("predict new photos", "task=predict data.root=FOLDER model.weights=best.pt"),
    ("count how often it is right", "task=evaluate data.root=test model.weights=best.pt"),
    ("hand the network to other programs", "task=export model.weights=best.pt"),
)
MORE = (
    "--help lists every setting with its value, --hydra-help Hydra's options. "
    "-m optimizer.lr=1e-3,1e-4 trains with each of the values."
)


def help_text() -> str:
    """The page, in lines that fit the screen."""
    lines = [*wrap(ABOUT, width()), "", f"{COMMAND} [KEY=VALUE] [GROUP=CHOICE] ...", ""]
    for what, settings in COMMANDS:
        lines += [f"{what}:", f"  {COMMAND} {settings}".rstrip()]
    for group, choices in _groups().items():
        lines += ["", f"{group}=", *_described(choices)]
    return "\n".join([*lines, "", *wrap(MORE, width())])


def _groups() -> dict[str, dict[str, str]]:
    """What can be chosen, by group, with a line about each; empty where its file has none."""
    folder = Path(config_dir())
    defaults: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    chosen = {
        group: choice for item in defaults["defaults"] if isinstance(item, dict) for group, choice in item.items()
    }
    return {
        group: {
            path.stem: f"{_about(path)}{' (default)' if path.stem == choice else ''}"
            for path in sorted((folder / group).glob("*.yaml"))
        }
        for group, choice in chosen.items()
        if not group.startswith("override ")
    }


def _about(path: Path) -> str:
    """The first comment of a file that is no directive of Hydra's."""
    first = path.read_text(encoding="utf-8").splitlines()[:2]
    return next((line[2:] for line in first if line.startswith("# ") and not line.startswith("# @")), "")


def _described(choices: dict[str, str]) -> Iterator[str]:
    indent = 4 + max(map(len, choices))
    for name, about in choices.items():
        if about:
            yield from wrap(f"  {name:{indent - 4}}  {about}", width(), subsequent_indent=" " * indent)
    if bare := [name for name, about in choices.items() if not about]:
        yield from wrap(", ".join(bare), width(), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
