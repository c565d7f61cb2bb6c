"""A real checkpoint, each of whose keys at every depth is dropped or altered in turn: it is refused, or goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, compose_config, load_model
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.checkpoints.contents import OF_A_RUN, checked
from adaptive_trainer.checkpoints.resume import check_data, check_stages, take_up
from adaptive_trainer.checkpoints.trust import trusted
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.data.datasets import build_datasets
from adaptive_trainer.errors import CheckpointError
from adaptive_trainer.ladder.resolve import stages
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.training.session import Parts, enter

SETTINGS = (
    "ladder=none", "trainer.batch_size=4", "trainer.epochs=2", "trainer.ema_decay=0.9", "data.image_size=8",
    "data.num_workers=0", "memory.limit=none", "trainer.engine=eager", "data.transforms=none",
)  # fmt: skip
Place = tuple[Any, ...]
CPU = torch.device("cpu")


class Pixels(Dataset[Any]):
    classes = ("a", "b")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 8, 8), index / 10), index % 2


def network(*_: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 8), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))


def fit(folder: Path, *overrides: str) -> Any:
    cfg = compose_config([*SETTINGS, *overrides])
    return Trainer(cfg, model=network, train_data=Pixels(), output_dir=folder).fit()


@pytest.fixture(scope="module", params=["adamw", "lion"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one epoch of two done."""
    folder = tmp_path_factory.mktemp(request.param)
    fit(folder, f"optimizer.name={request.param}", "trainer.epochs=1")
    return folder


def go_on(content: dict[str, Any], folder: Path) -> None:
    """What a resumed run does with a checkpoint, up to its next update."""
    path = folder / "last.pt"
    saved = checked(content, path, OF_A_RUN)
    cfg = compose((*SETTINGS, f"resume={path}"))
    if saved["request"] != (folder / "config.yaml").read_text():
        cfg = trusted(saved["request"], path, cfg)
    check_stages(saved, [name for name, _ in stages(cfg)])
    config = typed(cfg)
    check_data(saved, build_datasets(config, Pixels()))
    config.optimizer.name = folder.name.rstrip("0")
    with limited(CPU, "none") as capacity:
        parts = Parts(network, build_loss, "", 2, 8, CPU, capacity)
        session = enter(config, parts)
        take_up(saved, config, session.state, CPU)
        session.update.run(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), samples=0)


@cache
def compose(overrides: tuple[str, ...]) -> DictConfig:
    return compose_config(overrides)


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Every key at every depth; of long lists the first two and the last."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list | tuple) else []
    for key in [*keys[:2], *keys[-1:]] if isinstance(tree, list | tuple) and len(tree) > 6 else keys:
        yield (*at, key)
        yield from places(tree[key], (*at, key))


def changed(content: dict[str, Any], place: Place, change: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """A copy in which `change` has been called with the container and the key."""
    whole = copy.deepcopy(content)
    node: Any = whole
    for key in place[:-1]:
        if isinstance(node[key], tuple):
            node[key] = list(node[key])
        node = node[key]
    change(node, place[-1])
    return whole


def drop(node: Any, key: Any) -> None:
    del node[key]


def set_to(value: Any) -> Callable[[Any, Any], Any]:
    def change(node: Any, key: Any) -> None:
        node[key] = value

    return change


def other_shape(node: Any, key: Any) -> None:
    if not isinstance(node[key], Tensor):
        raise LookupError
    node[key] = node[key].flatten()[:-1] if node[key].ndim else node[key].new_zeros(3)


def no_number(node: Any, key: Any) -> None:
    if isinstance(node[key], Tensor) and node[key].is_floating_point():
        node[key] = torch.full_like(node[key], float("nan"))
    elif isinstance(node[key], float):
        node[key] = float("nan")
    else:
        raise LookupError


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "dropped": drop,
    "None": set_to(None),
    "a text": set_to("x"),
    "a list": set_to([]),
    "a dict": set_to({}),
    "minus one": set_to(-1),
    "huge": set_to(2**70),
    "a tensor": set_to(torch.zeros(2, 3)),
    "of another shape": other_shape,
    "no number": no_number,
}


def left(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.long
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CHANGES)
def test_every_key_altered(kind: str, every: int, stopped: Path) -> None:
    """It is refused with one line, or it is no matter, and training goes on."""
    content, refused = torch.load(stopped / "checkpoints" / "last.pt", weights_only=True), 0
    go_on(content, stopped)
    known = [place for place in places(content) if place[0] not in ("format", "version")]
    for place in known[list(CHANGES).index(kind) % every :: every]:
        with suppress(LookupError):
            altered = changed(content, place, CHANGES[kind])
            problem = outcome(altered, stopped)
            assert problem in ("", "refused"), f"{place} {kind}: {problem}"
            refused += problem == "refused"
    assert refused


def outcome(content: dict[str, Any], folder: Path) -> str:
    try:
        go_on(content, folder)
    except CheckpointError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


ALTERED: dict[str, tuple[Place, Callable[[Any, Any], Any]]] = {
    "key": (("position",), drop),
    "stage": (("stage",), set_to(3)),
    "random state": (("random", "torch"), other_shape),
    "cursor": (("position", "cursor"), set_to(8)),
    "shape": (("model", "0.weight"), other_shape),
    "weights": (("model", "3.weight"), no_number),
    "average": (("optimizer", "state", 0, "exp_avg"), drop),
    "settings": (("request",), set_to("trainer: {epochs: ten}")),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_refused_checkpoint_and_its_record_are_untouched(what: str, tmp_path: Path) -> None:
    fit(tmp_path, "trainer.epochs=1")
    path = tmp_path / "checkpoints" / "last.pt"
    torch.save(changed(torch.load(path, weights_only=True), *ALTERED[what]), path)
    before = left(tmp_path)
    with pytest.raises(CheckpointError):
        fit(tmp_path, "resume=auto")
    assert left(tmp_path) == before


@pytest.mark.parametrize("key", ["config", "model", "num_classes", "ema"])
@pytest.mark.parametrize("value", ["gone", None, "x", [], {}, -1])
def test_a_network_to_load(key: str, value: Any, stopped: Path, tmp_path: Path) -> None:
    content = torch.load(stopped / "checkpoints" / "best.pt", weights_only=True)
    content[key] = value
    if value == "gone":
        del content[key]
    torch.save(content, tmp_path / "best.pt")
    with suppress(CheckpointError):
        assert load_model(tmp_path / "best.pt", network) is not None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_checkpoint_cut_short_names_what_is_sound(share: float, stopped: Path, tmp_path: Path) -> None:
    whole, best = (stopped / "checkpoints" / name for name in ("last.pt", "best.pt"))
    (tmp_path / "before-small.pt").write_bytes(whole.read_bytes())
    (tmp_path / "best.pt").write_bytes(best.read_bytes())
    (tmp_path / "best-one.pt").write_bytes(best.read_bytes()[:-100])
    cut = tmp_path / "last.pt"
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"it is cut short, or no checkpoint; resume=") as caught:
        checkpoint.load(cut, to_resume=True)
    assert f"resume={tmp_path}/before-small.pt" in str(caught.value)
    assert f"load_model reads {tmp_path}/best.pt, which is sound" in str(caught.value)
    assert "best-one" not in str(caught.value)
    with pytest.raises(CheckpointError, match=f"use {tmp_path}/before-small.pt, which is sound") as caught:
        load_model(cut, network)
    assert "resume" not in str(caught.value)
