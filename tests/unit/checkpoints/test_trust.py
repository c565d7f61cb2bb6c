"""Saved settings are data: whatever they name to be called or loaded is refused, unless it is shipped or typed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from adaptive_trainer import Trainer, compose_config, load_model
from adaptive_trainer.checkpoints.trust import frozen, trusted
from adaptive_trainer.errors import CheckpointError

SMALL = (
    "model.name=test_resnet", "data=fakedata", "data.train.size=16", "data.val.size=4", "data.image_size=32",
    "data.num_workers=0", "trainer.batch_size=8", "memory.limit=none",
)  # fmt: skip
RUNS = "torch.utils.collect_env.run"
CALL = {"_target_": RUNS, "command": "touch PWNED"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    Trainer(compose_config([*SMALL, "ladder=none"]), output_dir=folder).fit()
    return folder


def request(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return content


def edited(folder: Path, path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint of plain data with other saved settings."""
    content = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    settings = yaml.safe_load(content["request"])
    edit(settings)
    torch.save({**content, "request": yaml.safe_dump(settings)}, path)
    return path


def put(place: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(settings: dict[str, Any]) -> None:
        *parents, last = place.split(".")
        node: Any = settings
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[last] = value

    return edit


def stage(*overrides: str) -> Callable[[dict[str, Any]], Any]:
    return put("phases.stages", [{"name": "one", "overrides": list(overrides)}])


def rung(*overrides: str) -> Callable[[dict[str, Any]], Any]:
    return put("ladder.rungs", [{"name": "one", "overrides": list(overrides)}])


DOORS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "training set": put("data.train", CALL),
    "validation set": put("data.val", CALL),
    "partial": put("data.train", {**CALL, "_partial_": True}),
    "positional": put("data.train", {"_target_": RUNS, "_args_": ["touch PWNED"]}),
    "argument of a shipped one": put("data.train.transform", CALL),
    "deep in a list": put("data.train.transform", [{"a": [CALL]}]),
    "loader of a folder": put(
        "data.train", {"_target_": "torchvision.datasets.DatasetFolder", "root": ".", "loader": CALL}
    ),
    "found by hydra": put("data.train.transform", {"_target_": "hydra.utils.get_method", "path": RUNS}),
    "another module's shipped name": put("data.train._target_", "adaptive_trainer.data.datasets.digits"),
    "shipped name with a blank": put("data.train._target_", "torchvision.datasets.FakeData "),
    "interpolated": lambda settings: (
        put("data.root", RUNS)(settings),
        put("data.train._target_", "${data.root}")(settings),
    ),
    "interpolated in part": put("data.train._target_", "torch.utils.${data.on_error}"),
    "model": put("model.kwargs.block", CALL),
    "optimizer": put("optimizer.kwargs.betas", CALL),
    "schedule": put("schedule.kwargs.cycle", CALL),
    "weights of a file": put("model.kwargs.checkpoint_path", "evil.pth"),
    "weights of a config": put("model.kwargs.pretrained_cfg", {"file": "evil.pth"}),
    "overlay": put("model.kwargs.pretrained_cfg_overlay", {"url": "http://evil/x.pth"}),
    "hub": put("model.name", "hf-hub:evil/repo"),
    "folder": put("model.name", "local-dir:evil"),
    "stage": stage(f"data.train._target_={RUNS}"),
    "stage that adds": stage(f"+data.train.transform={{_target_: {RUNS}}}"),
    "stage that casts": stage(f"data.train._target_=str({RUNS})"),
    "stage of the model": stage("model.name=local-dir:evil"),
    "stage with a file elsewhere": stage("data=../../evil"),
    "rung": rung(f"+model.kwargs.block={{_target_: {RUNS}}}"),
    "rung of the model": rung("model.name=hf-hub:evil/repo"),
    "resolver": put("data.train.size", "${oc.decode:16}"),
    "resolver that makes a node": put("data.train", "${oc.create:{_target_: " + RUNS + "}}"),
    "resolver in a resolver": put("data.root", "${oc.env:${oc.decode:HOME}}"),
    "resolver of the program": put("seed", "${code:1}"),
    "resolver of a whole group": put("data", "${code:1}"),
    "resolver in a stage": stage("data.root=${code:1}"),
    "resolver in a rung": rung("trainer.batch_size=${code:1}"),
    "resolver behind backslashes in a stage": stage(r"data.root=$\{code:1\}"),
    "resolver behind backslashes in a rung": rung(r"+model.kwargs.x=$\{code\:1\}"),
    "resolver behind backslashes, two levels down": stage(
        r"ladder.rungs=[{name: a, overrides: ['seed=$\\{code:1\\}']}]"
    ),
    "resolver put together": lambda settings: (
        put("data.train.a", "$")(settings),
        put("data.train.transform", "${data.train.a}{code:1}")(settings),
    ),
    "resolver put together of a path's dollar": lambda settings: (
        put("data.root", "photos$")(settings),
        put("data.train.transform", "${data.root}{code:1}")(settings),
    ),
    "resolver put together by a stage": lambda settings: (
        put("data.train.a", {"b": "$", "c": "x"})(settings),
        put("data.train.transform", "${data.train.a.b}${data.train.a.c}")(settings),
        stage("data.train.a.c='{code:1}'")(settings),
    ),
    "override put together": lambda settings: (
        put("data.train.a", "$")(settings),
        rung("seed=${data.train.a}{code:1}")(settings),
    ),
    "node put together": lambda settings: (
        put("data.train.a", "$")(settings),
        put("data.train.transform", "${data.train.a}{oc.create:'{_target_: " + RUNS + ", command: touch PWNED}'}")(
            settings
        ),
    ),
    "rung that takes back what it says": rung("model.name=local-dir:evil", "model.name=test_vit"),
    "rung by another setting": lambda settings: (
        put("model.name", "${optimizer.name}")(settings),
        put("optimizer.name", "test_resnet")(settings),
        rung("optimizer.name=local-dir:evil", "optimizer.name=adamw")(settings),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("door", DOORS)
def test_what_saved_settings_name_is_not_called(
    door: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a checkpoint, and by the settings of a run that was stopped before it had one."""
    monkeypatch.chdir(tmp_path)
    called: list[Any] = []
    OmegaConf.register_new_resolver("code", called.append, replace=True)
    path = edited(trained, tmp_path / "evil.pt", DOORS[door])
    with pytest.raises(CheckpointError, match=r"evil\.pt") as caught:
        Trainer(compose_config([f"resume={path}"]), output_dir="out").fit()
    assert "data=../../evil" in str(caught.value) or "allow it for this run by typing it too" in str(caught.value)
    settings = request(trained)
    DOORS[door](settings)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match=r"stopped/config\.yaml"):
        Trainer(compose_config(["resume=auto"]), output_dir="stopped").fit()
    assert called == []
    assert not (tmp_path / "PWNED").exists()
    assert not (tmp_path / "out").exists()


TYPED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "training set": put("data.train._target_", f"{__name__}.Images"),
    "validation set": put("data.val._target_", f"{__name__}.Images"),
    "in a list": put("data.train.transform", [{"_target_": f"{__name__}.Images"}]),
    "model": put("model.name", "local-dir:mine"),
    "weights": put("model.kwargs.checkpoint_path", "my weights.pth"),
    "resolver": put("data.root", "${oc.env:HOME}"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", TYPED)
def test_what_is_told_to_type_allows_it(kind: str, trained: Path) -> None:
    settings = request(trained)
    TYPED[kind](settings)
    text, source = yaml.safe_dump(settings), Path("last.pt")
    with pytest.raises(CheckpointError) as caught:
        trusted(text, source, compose_config(["resume=last.pt"]))
    words = shlex.split(str(caught.value).partition("by typing it too: ")[2])
    made = trusted(text, source, compose_config(["resume=last.pt", *words]))
    assert OmegaConf.to_container(made.data, resolve=False) == OmegaConf.to_container(
        OmegaConf.create(settings).data, resolve=False
    )
    assert made.model.name == settings["model"]["name"]


def test_a_folder_of_ones_own_names_what_it_likes(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(f"train: {{_target_: {__name__}.Images}}\n")
    settings = request(trained)
    put("data.train._target_", f"{__name__}.Images")(settings)
    cfg = compose_config(["resume=last.pt", "data=mine"], config_folder=tmp_path)
    assert trusted(yaml.safe_dump(settings), Path("last.pt"), cfg).data.train == {"_target_": f"{__name__}.Images"}


@pytest.mark.parametrize("root", ["my photos$", "$", "a$b/$c", "\\\\host\\c$\\photos", "{code:1}"])
def test_a_path_may_have_a_dollar(root: str, trained: Path) -> None:
    settings = request(trained)
    put("data.root", root)(settings)
    put("data.train.root", "${data.root}")(settings)
    made = trusted(yaml.safe_dump(settings), Path("last.pt"), compose_config(["resume=last.pt"]))
    assert made.data.train.root == root


def test_resolvers_are_called_once_and_their_values_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS", "/photos")
    cfg = compose_config(
        ["data=imagefolder", "data.root=${oc.env:PHOTOS}", "+model.kwargs.x={a: [1, '${oc.env:PHOTOS}']}"]
    )
    saved = yaml.safe_load(frozen(cfg))
    assert (saved["data"]["root"], saved["data"]["train"]["root"]) == ("/photos", "${data.root}")
    assert saved["model"]["kwargs"] == {"x": {"a": [1, "/photos"]}}


@pytest.mark.parametrize(
    "text", [None, 3, "", "- a", "a: [", "nosuch: 1", "trainer: {epochs: ten}", "data: 3", "x" * 9]
)
def test_what_is_no_settings(text: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the settings in last\.pt cannot be read: .*resume=null"):
        trusted(text, Path("last.pt"), compose_config(["resume=last.pt"]))


def test_saved_settings_that_cannot_be_right_are_told_as_saved(trained: Path) -> None:
    settings = request(trained)
    settings["trainer"]["epochs"] = -1
    with pytest.raises(
        CheckpointError, match=r"the settings in last\.pt cannot be used: trainer\.epochs=-1 is below 1"
    ):
        trusted(yaml.safe_dump(settings), Path("last.pt"), compose_config(["resume=last.pt"]))


@pytest.mark.parametrize(
    "model", [{"name": "local-dir:evil"}, {"name": "hf-hub:evil/repo"}, {"kwargs": {"block": CALL}}]
)
def test_a_network_of_a_checkpoint_is_made_of_nothing_else(
    model: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    content = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    content["config"]["model"] |= model
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="give load_model a factory"):
        load_model(tmp_path / "best.pt")


def test_a_network_is_loaded_without_the_file_that_it_began_with(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    content["config"]["model"]["kwargs"] = {"checkpoint_path": "gone.pth"}
    torch.save(content, tmp_path / "best.pt")
    weights = load_model(tmp_path / "best.pt").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in content["model"].items())


def test_settings_that_were_used_call_no_resolver(trained: Path, tmp_path: Path) -> None:
    """A checkpoint has them without interpolations; reading its model, or going on with it, makes none of them."""
    called: list[Any] = []
    OmegaConf.register_new_resolver("code", called.append, replace=True)
    for name in ("best.pt", "last.pt"):
        content = torch.load(trained / "checkpoints" / name, weights_only=True)
        content["config"]["output_dir"] = "${code:1}"
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name} is no checkpoint to go on with: 'config' is not what"):
            load_model(tmp_path / name)
    with pytest.raises(CheckpointError, match="'config' is not what was saved"):
        Trainer(compose_config([f"resume={tmp_path / 'last.pt'}"]), output_dir=tmp_path / "out").fit()
    assert called == []
