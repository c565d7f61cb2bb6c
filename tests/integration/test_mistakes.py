"""A table of mistakes: each ends with its exit code and one line on standard error that says what to do."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.mistakes import options_first
from adaptive_trainer.errors import ConfigError, DataError, ModelError
from adaptive_trainer.models.zoo import build_model
from tests.support.forking import ROOT, Launcher

FILES = {
    "mine/ladder/bad.yaml": "rungs: [{name: half, overrides: [",
    "mine/ladder/key.yaml": "rungs: [{name: one, override: [seed=1]}]",
    "mine/ladder/value.yaml": "rungs: [{name: one, overrides: [trainer.epochs=ten]}]",
    "mine/ladder/kind.yaml": "rungs: 5",
    "taken": "a file",
    "none.pt": "no checkpoint",
}
FAKE = ("data=fakedata", "data.train.size=24", "data.val.size=8", "data.image_size=32", "data.num_workers=0")
SMALL = (*FAKE, "model.name=mobilenetv3_small_050", "trainer.batch_size=8", "ladder=none", "hydra.run.dir=out")

# what is typed, and what the line has
TYPED = [
    ("trainer.epochs=ten", ["trainer.epochs=ten is not a whole number"]),
    ("trainer.epochs=10개", ["trainer.epochs=10개 is not a whole number"]),
    ("trainer.batch_size=8장", ["trainer.batch_size=8장 is neither a whole number above 0 nor max"]),
    ("trainer.epochs=1.5", ["trainer.epochs=1.5 is not a whole number"]),
    ("data.hflip=often", ["data.hflip=often is not a number"]),
    ("ladder.climb=perhaps", ["ladder.climb=perhaps is not true or false"]),
    ("trainer.epochs=null", ["trainer.epochs=null: it needs a value"]),
    ("trainer=3", ["trainer=3", "set one: trainer.epochs"]),
    ("model=resnet18", ["model=resnet18", "set one: model.name"]),
    ("data.root=${nope}", ["data.root", "'nope' not found"]),
    ("hydra.run.dir=${nope}", ["hydra.run.dir", "'nope' not found"]),
    ("--epochs 3", ["--epochs is no option", "trainer.epochs=3"]),
    ("--epochs=3", ["--epochs is no option", "trainer.epochs=3"]),
    ("--batch-size 8 trainer.epochs=2", ["--batch-size is no option", "trainer.batch_size=8"]),
    ("-m seed=1,2 --lr 1e-3", ["--lr is no option", "optimizer.lr=1e-3"]),
    ("-m seed=1,2 --foo", ["--foo is no option", "have no dashes"]),
    ("--cfg jobs", ["--cfg", "'jobs'", "--hydra-help"]),
    ("--config-dir", ["--config-dir", "expected one argument"]),
    ("--config-dir nowhere", ["nowhere", "not found"]),
    ("epochs", ["epochs has no value; write trainer.epochs=VALUE"]),
    ("photos", ["photos has no value; write photos=VALUE, and quotes around a value with a blank"]),
    ("trainer.epochs", ["trainer.epochs has no value; write trainer.epochs=VALUE"]),
    ("=3", ["=3 names no setting"]),
    ("~trainer", ["~trainer would remove a setting"]),
    ("~output_dir", ["~output_dir would remove a setting"]),
    ("data.train.root=/photos/Müller", ["cannot be read", "'data.train.root=\"/photos/Müller\"'"]),
    ("data.root=Müller,photos", ["cannot be read", "'data.root=\"Müller,photos\"'"]),
    ("data.root=a=b", ["data.root=a=b is named, and these settings take no data from there"]),
    ("data.root=/photos/Müller(1)", ["data.root=/photos/Müller(1) is named", "add data=imagefolder"]),
    ("trainer.epochs=[1", ["trainer.epochs=[1 cannot be read"]),
    ("trainer.epochs=1,2", ["trainer.epochs=1,2 are several values", "trainer.epochs=[1,2]", "-m in front"]),
    ("ladder.rungs=[{name:a,overrides:[trainer.epochs=2]}]", ["cannot be read; between brackets", '["a.b=1"]']),
    ("ladder=defualt", ["'ladder/defualt'", "default, exact, faithful, none", "did you mean ladder=default?"]),
    ("ladder=", ["Available options in 'ladder'"]),
    ("hydra/job_logging=nope", ["hydra/job_logging", "plain"]),
    ("trainer.epoch=3", ["there is no setting trainer.epoch; did you mean trainer.epochs?"]),
    ("trianer.epochs=3", ["there is no setting trianer.epochs; did you mean trainer.epochs?"]),
    ("optimzer.lr=3", ["there is no setting optimzer.lr; did you mean optimizer.lr?"]),
    ("laddr=none", ["there is no setting laddr; did you mean ladder?"]),
    ("+model.foo=3", ["there is no setting model.foo"]),
    ("ladder.rungs=[{nam:x}]", ["there is no 'nam'; allowed are name, overrides"]),
    ("data.train.size=5", ["there is no setting 'data.train.size'", "adaptive_trainer.data.digits, if that takes it"]),
    ("--config-dir mine ladder=bad", ["bad.yaml, line 1"]),
    ("ladder=key --config-dir mine", ["In 'ladder/key': there is no 'override'; allowed are name, overrides"]),
    ("--config-dir mine ladder=kind", ["In 'ladder/kind'"]),
    ("--config-dir mine ladder=value", ["'one'", "trainer.epochs=ten is not a whole number"]),
    ("hydra.run.dir=taken", ["hydra.run.dir=taken cannot be made", "Choose another hydra.run.dir"]),
    ("output_dir=taken", ["taken", "Choose another output_dir"]),
    ("resume=none.pt", ["none.pt"]),
    ("+data.train.speed=5", ["speed"]),
    ("+model.kwargs.checkpoint_path=nowhere.pt", ["checkpoint_path=nowhere.pt", "no such file"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


@pytest.mark.parametrize(("typed", "said"), TYPED, ids=[typed for typed, _ in TYPED])
def test_a_mistake_is_one_line(typed: str, said: list[str], launcher: Launcher, folder: Path) -> None:
    is_group = any(each in typed for each in ("ladder=", "hydra.run.dir", "data.train.size"))
    ended = launcher.run(*(() if is_group else SMALL), *typed.split(), folder=folder)
    assert ended.code == 2, ended.text
    first, *more = ended.err.splitlines()
    assert more == []
    assert first.startswith("error: ")
    assert all(text in first for text in said), first
    told = first.removeprefix("error: ")
    assert told not in ended.out
    assert "rror" not in ended.out


def test_options_may_stand_anywhere(launcher: Launcher, folder: Path) -> None:
    (folder / "mine" / "preset").mkdir()
    (folder / "mine" / "preset" / "own.yaml").write_text("# @package _global_\nseed: 7")
    args = ["seed=3", "--cfg", "job", "trainer.epochs=2", "--config-dir", "mine", "preset=own", "--resolve"]
    ended = launcher.run(*args, folder=folder)
    assert ended.code == 0, ended.text
    assert "epochs: 2" in ended.out
    swept = launcher.run("task=plan", "card=t4", "-m", "seed=1,2", "--config-dir", "mine", *SMALL[:-1], folder=folder)
    assert swept.code == 0, swept.text
    assert swept.out.count("lands on rung requested") == 2


def test_a_stage_may_choose_from_a_folder_of_ones_own(launcher: Launcher, folder: Path) -> None:
    (folder / "mine" / "ladder" / "own.yaml").write_text("rungs: [{name: two, overrides: [trainer.batch_size=2]}]")
    stage = "phases.stages=[{name:a,overrides:['ladder=own']}]"
    ended = launcher.run("task=plan", "card=t4", "--config-dir", "mine", *SMALL[:-2], stage, folder=folder)
    assert ended.code == 0, ended.text
    assert "two" in ended.out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a=1", "-m", "b=2"], ["-m", "a=1", "b=2"]),
        (["-cd", "x", "a=1", "--cfg", "job", "a=1"], ["-cd", "x", "--cfg", "job", "a=1", "a=1"]),
        ([], []),
        (["~card"], ["~card"]),
    ],
)
def test_the_order_of_arguments(given: list[str], expected: list[str]) -> None:
    assert options_first(given) == expected


def test_an_error_of_the_users_own_code(launcher: Launcher, tmp_path: Path) -> None:
    """It has a traceback, and is named first."""
    lines = ["class Images:", "    classes = ['a', 'b']", "    def __len__(self): return 24"]
    lines += ["    def __getitem__(self, index): raise LookupError('a bug')"]
    (tmp_path / "own.py").write_text("\n".join(lines))
    args = (*SMALL[4:], "data.image_size=32", "data.num_workers=0", "data.train._target_=own.Images")
    ended = launcher.run(*args, folder=tmp_path)
    assert ended.code == 1, ended.text
    assert ended.err.startswith("error: LookupError: a bug\n\nTraceback")
    assert ended.err.count("Traceback") == 1
    assert "Error executing job" not in ended.err  # what Hydra adds
    assert "LookupError" not in ended.out
    assert "LookupError: a bug" in (tmp_path / "out" / "adaptive_trainer.log").read_text()


def test_every_job_of_a_sweep_says_what_is_wrong_once(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run("-m", *SMALL[:-1], "hydra.sweep.dir=sweep", "trainer.batch_size=25,26", folder=tmp_path)
    assert ended.code == 2
    assert [line.startswith("error: trainer.batch_size=2") for line in ended.err.splitlines()] == [True, True]
    for number in "01":
        assert "trainer.batch_size=2" in (tmp_path / "sweep" / number / "adaptive_trainer.log").read_text()


def test_relative_paths_stay_valid_in_another_folder(launcher: Launcher, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (32, 32), (number * 20, ord(name), 0)).save(tmp_path / "photos" / name / f"{number}.png")
    data = ("data=imagefolder", "data.root=photos", "trainer.batch_size=4", "data.image_size=32", "data.num_workers=0")
    args = (SMALL[5], "ladder=none", "hydra.job.chdir=true", "output_dir=mine")
    ended = launcher.run(*args, *data, folder=tmp_path)
    assert ended.code == 0, ended.text
    assert f"best model: {tmp_path}/mine/checkpoints/best.pt" in ended.out
    again = launcher.run(*args, "resume=mine/checkpoints/last.pt", "trainer.epochs=2", folder=tmp_path)
    assert again.code == 0, again.text


def test_weights_of_other_classes(launcher: Launcher, tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict(), tmp_path / "three.pth")
    path = f"+model.kwargs.checkpoint_path={tmp_path}/three.pth"
    ended = launcher.run(*SMALL, path, folder=tmp_path)
    assert ended.code == 2, ended.text
    (line,) = ended.err.splitlines()
    assert "three.pth cannot be loaded into mobilenetv3_small_050" in line
    assert "as many classes" in line
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=10).state_dict(), tmp_path / "three.pth")
    fitting = launcher.run(*SMALL, path, folder=tmp_path)
    assert (fitting.code, fitting.err) == (0, ""), fitting.text


@pytest.mark.parametrize("name", ["test_resnet", "hf-hub:timm/test_resnet.r160_in1k"])
def test_a_hub_that_does_not_answer_is_asked_once(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the discard port
    with caplog.at_level("WARNING", logger="huggingface_hub"), pytest.raises(ModelError, match=name):
        build_model(timm_config(name), 3)
    assert "Retrying" not in caplog.text


def timm_config(name: str) -> Any:
    return compose_config([f'model.name="{name}"', "model.pretrained=true"]).model


# -- in Python: networks and data of the caller's own


class Samples(Dataset[Any]):
    def __init__(self, kind: str, **named: Any) -> None:
        self.kind = kind
        vars(self).update(named)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        image = torch.full((3, 32, 32), index / 24)
        return {
            "pair": (image, index % 3),
            "dict": {"image": image, "label": index % 3},
            "text": (image, "abc"[index % 3]),
            "image": image,
            "three": (image, index % 3, "name"),
            "float": (image, float(index % 3)),
        }[self.kind]


def fit(data: Any, folder: Path, model: Any = None, limit: str = "null") -> Trainer:
    settings = ["data.image_size=32", "data.num_workers=0", "trainer.batch_size=8", "model.name=test_resnet"]
    trainer = Trainer(
        compose_config([*settings, f"memory.limit={limit}", "ladder=none"]),
        model=model,
        train_data=data,
        output_dir=folder,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Samples("dict"), "it is a dict of image, label; wrap the data set"),
        (Samples("text"), r"its label is the text '\w'; number the classes from 0"),
        (Samples("image"), "it is a Tensor, and not a pair"),
        (Samples("three"), "it is a tuple of 3, and not a pair"),
        (Samples("float"), "float"),
        (Samples("dict", classes=["a", "b", "c"]), "it is a dict of image, label"),
        (Samples("text", num_classes=3), r"its label is the text '\w'"),
        (Samples("text", targets=list("abc" * 8)), r"its label is the text '\w'"),
        (Samples("float", labels=[0.0, 1.0]), "float"),
    ],
)
def test_data_of_another_form(data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        fit(data, tmp_path)


def test_reading_all_labels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Samples("pair"), tmp_path)
    assert caplog.text.count("samples are read once to count the classes; model.num_classes=N spares that") == 1


def test_a_network_that_exists_already(tmp_path: Path) -> None:
    existing = timm.create_model("test_resnet", num_classes=3)
    before = copy.deepcopy(existing.state_dict())
    trainer = fit(Samples("pair"), tmp_path, lambda config, classes: existing, limit="100MiB")
    assert trainer.model is not existing
    assert trainer.model is not None
    assert all(torch.equal(value, before[key]) for key, value in existing.state_dict().items())
    assert any(not torch.equal(value.cpu(), before[key]) for key, value in trainer.model.state_dict().items())
    assert {parameter.device.type for parameter in existing.parameters()} == {"cpu"}


def test_a_network_that_exists_and_cannot_be_copied(tmp_path: Path) -> None:
    existing = timm.create_model("test_resnet", num_classes=3)
    existing.__dict__["lock"] = threading.Lock()
    with pytest.raises(ConfigError, match=r"exists already, and it cannot be copied \(TypeError.*make a new one"):
        fit(Samples("pair"), tmp_path, lambda config, classes: existing, limit="100MiB")


@pytest.mark.parametrize("limit", ["null", "100MiB"])
def test_a_factory_that_loads_weights_is_not_warned_of(limit: str, tmp_path: Path) -> None:
    weights = timm.create_model("test_resnet", num_classes=3).state_dict()

    def make(config: Any, classes: int) -> nn.Module:
        network: nn.Module = timm.create_model("test_resnet", num_classes=classes)
        network.load_state_dict(weights)
        warnings.warn("of the factory's own", stacklevel=1)
        return network

    settings = ["data.image_size=32", "data.num_workers=0", "trainer.batch_size=8", f"memory.limit={limit}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(compose_config(settings), model=make, train_data=Samples("pair"), output_dir=tmp_path).fit()
    assert {str(each.message) for each in caught} == {"of the factory's own"}


WRONG = """
from torch import nn
from adaptive_trainer import Trainer, compose_config

def make(config, classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))

settings = {settings}
Trainer(compose_config(settings), model=make, output_dir="out").fit()
"""


def test_a_wrong_layer_is_told_once(launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WRONG.format(settings=[*FAKE, "trainer.batch_size=8"]))
    ended = launcher.run(script=script, folder=tmp_path)
    assert ended.code == 1
    assert ended.text.count("mat1 and mat2 shapes cannot be multiplied") == 1
    assert "fake_tensor" not in ended.text
    assert ended.err.startswith("Traceback")
    assert str(ROOT) not in ended.out


@pytest.mark.parametrize(
    ("overrides", "own", "is_simulated"),
    [
        ([], False, True),
        (["data=fakedata"], False, True),
        (["data=cifar10"], False, False),
        (["data=imagefolder", "data.root=photos"], False, False),
        (["data=fakedata"], True, False),
        (["data=imagefolder", "data.root=photos", "memory.limit=1GiB"], False, True),
        (["memory.limit=none"], False, False),
    ],
)
def test_a_card_is_simulated_for_demo_data_and_who_asks(overrides: list[str], own: bool, is_simulated: bool) -> None:
    from adaptive_trainer.config.overrides import typed
    from adaptive_trainer.memory.limit import limit_for, limited

    cpu = torch.device("cpu")
    with limited(cpu, limit_for(typed(compose_config(overrides)), cpu, is_own_data=own)) as capacity:
        assert (capacity.simulated is not None) == is_simulated
        assert ("simulated card" in capacity.description) == is_simulated
