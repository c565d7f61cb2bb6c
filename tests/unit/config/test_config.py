"""The settings: every YAML composes, bad input gets one clear message, the option surface is frozen."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from adaptive_trainer.cli import main as cli
from adaptive_trainer.config.mistakes import no_setting
from adaptive_trainer.config.overrides import (
    apply_overrides,
    asked,
    at_home,
    compose_config,
    config_dir,
    readable,
    typed,
)
from adaptive_trainer.config.schema import Config
from adaptive_trainer.config.validate import check
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import stages

GROUPS = sorted(p for p in Path(config_dir()).glob("*/*.yaml") if p.parent.name != "sweep")
SWEEPS = sorted(Path(config_dir()).glob("sweep/*.yaml"))


@pytest.mark.long
@pytest.mark.parametrize("path", GROUPS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_choice_composes(path: Path) -> None:
    extra = ["data.root=somewhere"] if path.parent.name == "data" else []
    config = typed(compose_config([f"{path.parent.name}={path.stem}", *extra]))
    check(config)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_composes(path: Path) -> None:
    typed(compose_config([f"+sweep={path.stem}"]))


def test_defaults_are_the_documented_request() -> None:
    config = typed(compose_config())
    assert (config.trainer.batch_size, config.data.image_size, config.trainer.precision) == (24, 224, "fp32")
    assert (config.model.name, config.optimizer.name) == ("efficientnet_b0", "adamw")


@pytest.mark.parametrize(
    ("preset", "expected"), [("minimum", (8, 192, 0)), ("balanced", (16, 224, 2)), ("maximum", (24, 224, 4))]
)
def test_presets(preset: str, expected: tuple[int, int, int]) -> None:
    config = typed(compose_config([f"preset={preset}"]))
    assert (config.trainer.batch_size, config.data.image_size, config.data.num_workers) == expected


def test_a_value_on_the_command_line_beats_the_preset() -> None:
    assert typed(compose_config(["preset=minimum", "trainer.batch_size=12"])).trainer.batch_size == 12


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.batchsize=3", "batchsize"),
        ("trainer.epochs=big", "big"),
        ("ladder=nowhere", "nowhere"),
        ("optimizer=nowhere", "adamw"),  # the choices there are
    ],
)
def test_compose_refuses_what_does_not_exist(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        compose_config([override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.batchsize=3", "no setting 'trainer.batchsize'"),
        ("trainer.epochs=big", "big"),
        ("trainer.batch_size=3,4", "sweep"),
        ("~trainer.batch_size", "removes"),
        ("optimizer=nowhere", "nowhere"),
    ],
)
def test_apply_overrides_refuses_what_does_not_exist(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        apply_overrides(compose_config(), [override])


def test_apply_overrides_reports_all_problems_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)trainer\.nothing.*data\.image_size=big"):
        apply_overrides(compose_config(), ["trainer.nothing=1", "data.image_size=big"])


def test_apply_overrides_leaves_the_original_alone() -> None:
    cfg = compose_config()
    before = OmegaConf.to_yaml(cfg)
    apply_overrides(cfg, ["trainer.batch_size=2", "optimizer=sgd", "preset=minimum", "+model.kwargs.drop_rate=0.3"])
    assert OmegaConf.to_yaml(cfg) == before


def test_a_group_choice_replaces_its_whole_node() -> None:
    cfg = compose_config(["+optimizer.kwargs.eps=1e-6"])
    config = typed(apply_overrides(cfg, ["optimizer=sgd"]))
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.kwargs) == ("sgd", 0.05, {})


@pytest.mark.parametrize("turn", [1, -1])
def test_a_group_choice_comes_before_values_wherever_it_stands(turn: int) -> None:
    """As on the command line, whose overrides a resumed run applies to its saved settings."""
    overrides = ["optimizer=sgd", "optimizer.lr=0.3", "preset=minimum", "trainer.batch_size=2"][::turn]
    config = typed(apply_overrides(compose_config(), overrides))
    assert (config.optimizer.name, config.optimizer.lr, config.trainer.batch_size) == ("sgd", 0.3, 2)
    assert config == typed(compose_config(overrides))
    added = [text.replace("preset", "+preset") for text in overrides]
    assert typed(apply_overrides(compose_config(), added)) == config


def test_a_global_choice_is_laid_over_the_settings() -> None:
    config = typed(apply_overrides(compose_config(["trainer.epochs=7"]), ["preset=minimum"]))
    assert (config.trainer.batch_size, config.data.image_size, config.trainer.epochs) == (8, 192, 7)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.batch_size=0",
        "trainer.batch_size=big",
        "trainer.batch_size=maximum",
        "trainer.epochs=0",
        "trainer.micro_batch_size=32",
        "trainer.precision=fp8",
        "trainer.clip_grad=-1",
        "trainer.clip_grad=nan",
        "trainer.label_smoothing=1.0",
        "trainer.ema_decay=1.0",
        "trainer.lr_policy=cube",
        "data.image_size=0",
        "data.num_workers=-1",
        "data.val_fraction=1.0",
        "data.transforms=other",
        "data.on_error=ignore",
        "optimizer.lr=-0.1",
        "optimizer.lr=nan",
        "model.num_classes=1",
        "optimizer.momentum=-1",
        "schedule.min_lr=-1",
        "schedule.min_lr=nan",
        "schedule.warmup_epochs=1e3",
        "data.mean=[nan,0,0]",
        "data.std=[inf,1,1]",
        "seed=9223372036854775808",
        "seed=-9223372036854775808",
    ],
)
def test_check_refuses_values_that_cannot_be_right(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        check(typed(compose_config([override])))


@pytest.mark.parametrize("override", ["card=null", "preset=null", "ladder=3"])
def test_a_group_that_is_given_no_text(override: str) -> None:
    with pytest.raises(ConfigError, match=r"Config group override must be .*leave it out"):
        compose_config([override])


def test_what_cannot_be_composed_in_python(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a list of texts, such as \['trainer\.epochs=3'\], and not 'trainer\.epochs=1'"
    ):
        compose_config("trainer.epochs=1")
    for wrong in (None, [1], 3):
        with pytest.raises(ConfigError, match="a list of texts"):
            compose_config(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"quote it: 'model\.name=\"net \(1\)\"'"):
        compose_config(["model.name=net (1)"])
    assert compose_config(["data.root=photos (1)"]).data.root == "photos (1)"  # paths are quoted for people
    assert compose_config(['data.root="bröken (1)=x"']).data.root == "bröken (1)=x"
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        compose_config(config_folder=tmp_path / "nowhere")


def test_check_gathers_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        check(typed(compose_config(["trainer.epochs=0", "data.image_size=0", "trainer.precision=fp8"])))
    assert all(key in str(caught.value) for key in ("trainer.epochs", "data.image_size", "trainer.precision"))


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "mine.yaml").write_text("rungs: [{name: tiny, overrides: [trainer.batch_size=2]}]\n")
    config = typed(compose_config(["ladder=mine"], config_folder=tmp_path))
    assert [rung.name for rung in config.ladder.rungs] == ["tiny"]


def surface(node: Any, prefix: str = "") -> list[str]:
    names = []
    for field in fields(node):
        value = getattr(node, field.name)
        names += surface(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return names


def test_the_option_surface_is_frozen() -> None:
    """A new setting is a decision: it is added here, to the documentation and to the change log."""
    frozen = (Path(__file__).parent / "options.txt").read_text(encoding="utf-8").split()
    assert surface(Config()) == frozen


def test_what_a_task_or_a_stage_sets_itself_is_not_judged_beforehand() -> None:
    stages = "phases.stages=[{name:one,overrides:['trainer.batch_size=32']}]"
    for more in ([stages], ["task=memory", "batch=[32]"]):
        cli._check(compose_config([*more, "trainer.micro_batch_size=32"]))
    with pytest.raises(ConfigError, match="micro_batch_size=32 is above"):
        cli._check(compose_config(["trainer.micro_batch_size=32"]))


@pytest.mark.parametrize(
    ("added", "near"),
    [
        ("+trainer.batchsize=3", "trainer.batch_size"),
        ("++trainer.batchsize=3", "trainer.batch_size"),
        ("+epochs=3", "trainer.epochs"),
        ("+memory.limits=6GiB", "memory.limit"),
        ("+optimizer.kwarg={}", "optimizer.kwargs"),
    ],
)
def test_what_nothing_uses_cannot_be_added(added: str, near: str) -> None:
    key = added.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError, match=f"^there is no setting {key}; did you mean {near}"):
        typed(compose_config([added]))
    with pytest.raises(ConfigError, match=f"^there is no setting {key}; did you mean {near}"):
        compose_config([added.lstrip("+")])


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("trianer.epochs", "trainer.epochs"),
        ("traner.epochs", "trainer.epochs"),
        ("trainr.epoch", "trainer.epochs"),
        ("optimzer.lr", "optimizer.lr"),
        ("memry.limit", "memory.limit"),
        ("modle.nmae", "model.name"),
        ("dat.root", "data.root"),
        ("laddr", "ladder"),
        ("batch_size", "trainer.batch_size, trainer.eval_batch_size, trainer.micro_batch_size"),
        ("trainer.hflip", "data.hflip"),
    ],
)
def test_a_mistyped_setting_is_compared_word_by_word(mistyped: str, meant: str) -> None:
    assert no_setting(mistyped) == f"there is no setting {mistyped}; did you mean {meant}?"


def test_every_added_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no setting foo; --help lists them all; there is no setting trainer\.foo"):
        typed(compose_config(["+foo=1", "+trainer.foo=1"]))


def test_free_form_settings_take_any_key() -> None:
    free = ("model.kwargs", "optimizer.kwargs", "schedule.kwargs", "data.train", "data.val")
    config = typed(compose_config(["data=fakedata", *[f"+{node}.anything=1" for node in free]]))
    assert config.model.kwargs == config.optimizer.kwargs == config.schedule.kwargs == {"anything": 1}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("data.root=~/photos", "data.root=/home/me/photos"),
        ("data.root=~", "data.root=/home/me"),
        ("data.root=~/a,~/b", "data.root=/home/me/a,/home/me/b"),
        ("resume=~/my-run_1/last.pt", "resume=/home/me/my-run_1/last.pt"),
        ("~trainer.epochs", "~trainer.epochs"),
        ("data.root=photos~/a", "data.root=photos~/a"),
    ],
)
def test_the_home_folder(given: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home(given) == meant


def test_settings_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert compose_config(["data=imagefolder", "data.root=~/photos"]).data.train.root == "/home/me/photos"


@pytest.mark.long
@pytest.mark.parametrize("value", ["사진", "photos (1)", "a=b", "Müller's/x", "a\\b (1)", "/ä/{b}", "~/사진"])
def test_paths_need_no_quotes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    meant = value.replace("~", "/home/me")
    for key in ("data.root", "model.weights", "output_dir", "resume"):
        assert OmegaConf.select(compose_config([f"{key}={value}"]), key) == meant


@pytest.mark.parametrize(
    "text", ["data.root=my photos", "data.root='사진'", "output_dir=a,b", "data.root=null", "++resume=auto", "seed=7"]
)
def test_what_hydra_can_read_stays_as_it_is(text: str) -> None:
    assert readable(text) == text


@pytest.mark.parametrize("text", ["data.root=사진,b", "data.root=[사진", "data.root='a", "model.name=ä"])
def test_what_may_mean_something_else_is_not_guessed(text: str) -> None:
    assert readable(text) == text
    with pytest.raises(ConfigError, match="cannot be read"):
        compose_config([text])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.lr={value} is no number"):
        check(typed(compose_config([f"optimizer.lr={value}"])))


TYPED = (
    ["data.image_size=32", "trainer.batch_size=8", "trainer.epochs=1"],
    ["optimizer=sgd", "optimizer.lr=1e-4", "trainer.precision=bf16"],
    ["++data.num_workers=7", "trainer.micro_batch_size=2", "trainer.batch_size=max", "ladder=none"],
)


@pytest.mark.long
@pytest.mark.parametrize("typed_", TYPED)
def test_what_is_typed_wins_over_presets_and_stages(typed_: list[str], tmp_path: Path) -> None:
    """In whatever order, on what a file says of its stages by values, choices and presets."""
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "mine.yaml").write_text(
        "stages:\n"
        "  - {name: a, overrides: [preset=minimum, optimizer=lion, trainer.precision=fp16, ladder=faithful]}\n"
        "  - {name: b, overrides: [trainer.epochs=7, data.num_workers=1, optimizer.weight_decay=0.25]}\n"
    )
    alone = typed(compose_config(typed_))
    keys = [text.lstrip("+").partition("=")[0] for text in typed_]
    for files in (["preset=maximum"], ["phases=staged"], ["phases=mine", "preset=balanced"]):
        for overrides in ([*files, *typed_], [*typed_, *files]):
            for _, settings in stages(compose_config(overrides, config_folder=tmp_path)):
                for key in keys:
                    assert OmegaConf.select(settings, f"{key}.name" if key == "optimizer" else key) == OmegaConf.select(
                        OmegaConf.structured(alone), f"{key}.name" if key == "optimizer" else key
                    ), (key, overrides)
    stage = stages(compose_config(["phases=mine", *typed_], config_folder=tmp_path))[1][1]
    assert stage.optimizer.weight_decay == 0.25 or "optimizer=sgd" in typed_


def test_a_stage_that_is_typed_says_what_it_says() -> None:
    [(_, settings)] = stages(
        compose_config(["phases.stages=[{name: a, overrides: ['trainer.epochs=5']}]", "trainer.epochs=1"])
    )
    assert settings.trainer.epochs == 5


def test_settings_remember_what_was_typed_and_what_was_set_since() -> None:
    cfg = compose_config(["trainer.epochs=3"])
    cfg.model.name, cfg.model.kwargs = 'a "b" \\', {"a": [1, None, True, 1e-5], "b": {"c": "x y"}}
    changed = apply_overrides(compose_config(), asked(copy.deepcopy(cfg)).overrides)
    assert typed(changed) == typed(cfg)
    assert asked(DictConfig(OmegaConf.merge(cfg, {"seed": 3}))).overrides[-1] == "++seed=3"


@pytest.mark.parametrize("choice", ["../../x", "/etc/x", "a/../../x"])
def test_a_choice_is_no_path_to_elsewhere(choice: str) -> None:
    with pytest.raises(ConfigError, match="no name of a file in a folder of configs"):
        apply_overrides(compose_config(), [f"data={choice}"])
