"""`trainer.batch_size=max`: the boundary that trying every size finds, with few tries that fail."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.cli.plan import run_memory, run_plan
from adaptive_trainer.config.schema import ModelConfig, RungConfig
from adaptive_trainer.errors import ConfigError, LadderExhausted, OutOfMemory, Stopped
from adaptive_trainer.ladder.batch_size import largest
from adaptive_trainer.ladder.resolve import changes, recipe, resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.planning.api import predict
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.report.result import Result
from adaptive_trainer.step.dry_run import dry_run
from adaptive_trainer.training.session import Parts, enter
from tests.integration.test_resume import differing
from tests.integration.test_trainer import Seen

MiB = 2**20
CPU = torch.device("cpu")

# -- the search alone


def search(boundary: int, **where: int) -> tuple[int | None, list[int]]:
    """What is found where all sizes up to `boundary` hold, and what was tried, in order."""
    tried: list[int] = []

    def holds(size: int) -> bool:
        tried.append(size)
        return size <= boundary

    return largest(holds, **where), tried


@given(data=st.data(), most=st.integers(1, 5000), least=st.integers(1, 3), step=st.integers(1, 3000))
def test_any_guess_leads_to_the_boundary(data: st.DataObject, most: int, least: int, step: int) -> None:
    least = min(least, most)
    boundary = data.draw(st.integers(0, most + 10))
    guess = data.draw(st.integers(-10, 2 * most))
    found, tried = search(boundary, guess=guess, step=step, least=least, most=most)
    right = min(boundary, most)
    assert found == (right if right >= least else None)
    assert len(set(tried)) == len(tried), "a size is tried once"
    assert all(least <= size <= most for size in tried)
    if found is not None:
        assert found in tried
        assert found == most or found + 1 in tried
    failed = sum(size > boundary for size in tried)
    assert failed <= 2 * math.log2(most) + 3
    assert len(tried) <= 4 * math.log2(most) + 5


@given(st.integers(1, 70), st.floats(-0.03, 0.03))
def test_a_near_guess_fails_twice_at_the_most(boundary: int, off: float) -> None:
    guess = round(boundary * (1 + off))
    found, tried = search(boundary, guess=guess, step=max(1, guess // 100), least=1, most=10_000)
    assert found == boundary
    assert sum(size > boundary for size in tried) <= 2


# -- on the simulated card


class Conv(nn.Module):
    """A small network with BatchNorm.

    Attributes:
        reads: it looks at values, so that it cannot be predicted.
    """

    def __init__(self, classes: int, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads
        self.body = nn.Sequential(nn.Conv2d(3, 4096, 3, padding=1), nn.BatchNorm2d(4096), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4096 * 64, classes)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            assert float(x[0, 0, 0, 0]) >= 0
        out: Tensor = self.head(self.body(x))
        return out


def settings(*overrides: str, batch: str = "max", steps: dict[str, list[str]] | None = None) -> DictConfig:
    cfg = compose_config([
        f"trainer.batch_size={batch}", "data.image_size=8", "data.transforms=none", "data.num_workers=0",
        "ladder=none", *overrides,
    ])  # fmt: skip
    cfg.ladder.rungs = [RungConfig(name, overrides) for name, overrides in (steps or {}).items()]
    return cfg


def fit(folder: Path, *overrides: str, samples: int = 40, reads: bool = False, **how: Any) -> Result:
    def make(config: ModelConfig, classes: int) -> nn.Module:
        return Conv(classes, reads)

    model = how.pop("model", make)
    cfg = settings(*overrides, **how)
    return Trainer(cfg, model=model, train_data=Seen(samples), val_data=Seen(6), output_dir=folder).fit()


def tried(result: Result) -> list[tuple[int, str]]:
    entries = [entry for entry in result.attempts if entry.rung.startswith("max-")]
    return [(int(entry.rung.removeprefix("max-")), entry.outcome) for entry in entries]


def brute_force(limit: str, samples: int) -> int:
    """The largest of all sizes that is proven in a session and on a card of its own."""
    found = 0
    for size in range(2, samples + 1):
        config = resolve(settings(batch=str(size)))[0].settings
        with limited(CPU, limit) as capacity:
            parts = Parts(lambda *_: Conv(3), build_loss, "", 3, samples, CPU, capacity)
            try:
                sizes = Recipe(
                    batch_size=size, micro_batch_size=size, eval_batch_size=size, image_size=8, num_classes=3
                )
                dry_run(enter(config, parts).update, sizes)
            except OutOfMemory:
                break
            found = size
    return found


@pytest.mark.parametrize("limit", ["60MiB", "90MiB", "120MiB"])
def test_it_is_what_brute_force_finds(limit: str, tmp_path: Path) -> None:
    right = brute_force(limit, 40)
    assert 2 < right < 40
    for reads in (False, True):  # with a prediction, and without one
        result = fit(tmp_path / str(reads), f"memory.limit={limit}", reads=reads)
        assert (result.rung, result.used.batch_size) == ("requested", right)
        assert {(right, "fits"), (right + 1, "oom")} <= set(tried(result))
        failed = sum(outcome == "oom" for _, outcome in tried(result))
        assert failed <= (5 if reads else 2)
        told = "not predicted" if reads else r"predicted \d+"
        [event] = [event for event in result.events if event.startswith("batch size max")]
        pattern = rf"batch size max -> {right}: {right} is proven and {right + 1} ran out of memory in .* \({told}, "
        assert re.match(pattern, event)
        assert event.endswith(f", {len(tried(result))} tried, {failed} failed)")


def test_the_learning_rate_is_for_the_default_batch_size(tmp_path: Path) -> None:
    result = fit(tmp_path, "memory.limit=60MiB", "trainer.lr_policy=linear", "optimizer.lr=0.024")
    size = result.used.batch_size
    assert result.used.lr == pytest.approx(0.001 * size)
    by_key = {change["key"]: change for change in json.loads((tmp_path / "result.json").read_text())["changes"]}
    assert (by_key["trainer.batch_size"]["asked"], by_key["trainer.batch_size"]["used"]) == ("max", size)
    assert f"{size} is proven and {size + 1} ran out of memory" in by_key["trainer.batch_size"]["why"]
    assert by_key["optimizer.lr"]["asked"] == 0.024
    assert f"linear rule for batch size 24 -> {size}" in by_key["optimizer.lr"]["why"]
    assert fit(tmp_path / "none", "memory.limit=60MiB", "trainer.lr_policy=none").used.lr == 1e-3


def test_the_search_leaves_no_trace_in_what_is_trained(tmp_path: Path) -> None:
    how = ["memory.limit=60MiB", "trainer.lr_policy=none", "trainer.epochs=2"]
    size = fit(tmp_path / "max", *how).used.batch_size
    fit(tmp_path / "number", *how, batch=str(size))
    found, right = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("max", "number"))
    for key in ("model", "optimizer", "random", "position", "meters"):
        assert differing(found[key], right[key]) == []


def test_the_training_set_bounds_it(tmp_path: Path) -> None:
    result = fit(tmp_path, "memory.limit=200MiB", samples=11)
    assert result.used.batch_size == 11
    assert tried(result) == [(11, "fits")]
    assert any("11: proven in 200 MiB, and there are no more training samples" in event for event in result.events)


def test_where_nothing_fits_the_ladder_goes_on(tmp_path: Path) -> None:
    with pytest.raises(LadderExhausted, match="requested: oom"):
        fit(tmp_path / "a", "memory.limit=12MiB")

    def make(config: ModelConfig, classes: int) -> nn.Module:
        small = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
        return small if config.name == "mobilenetv3_small_050" else Conv(classes)

    result = fit(
        tmp_path / "b", "memory.limit=12MiB", model=make, steps={"small": ["model.name=mobilenetv3_small_050"]}
    )
    assert (result.rung, result.used.batch_size) == ("small", 2)
    assert any("2: not even that is proven" in event for event in result.events)


class Grows(Conv):
    """Takes more than the card has for more than four samples, from training pass `at` on."""

    def __init__(self, classes: int, at: int) -> None:
        super().__init__(classes)
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        held = torch.empty(256 * MiB if len(x) > 4 and self.passes >= self.at else 1, dtype=torch.uint8)
        out = super().forward(x)
        del held
        return out


def test_out_of_memory_in_training_goes_down_the_ladder(tmp_path: Path) -> None:
    steps = {"more": ["trainer.batch_size=512"], "four": ["trainer.batch_size=4"]}
    result = fit(
        tmp_path,
        "memory.limit=200MiB",
        "trainer.epochs=2",
        model=lambda config, classes: Grows(
            classes, 6
        ),  # two passes of a dry run at 20, two more of another, one trains
        samples=20,
        steps=steps,
    )
    assert [(entry.rung, entry.outcome) for entry in result.attempts] == [
        ("max-20", "fits"), ("requested", "fits"), ("requested", "oom"), ("more", "skipped"), ("four", "fits"),
    ]  # fmt: skip
    assert result.requested.batch_size == 20
    assert result.used.lr == pytest.approx(1e-3 * math.sqrt(4 / 24))
    [change] = [change for change in result.changes if change.key == "trainer.batch_size"]
    assert (change.asked, change.used) == ("max", 4)
    assert change.why.startswith("rung four is used; out of memory: requested; passed over: more (")


def test_a_resumed_run_keeps_what_was_found(tmp_path: Path) -> None:
    first = fit(tmp_path, "memory.limit=60MiB")
    size = first.used.batch_size
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["largest_batch"] == size
    again = fit(tmp_path, "memory.limit=90MiB", "trainer.epochs=2", "resume=auto")
    assert (again.used.batch_size, again.metrics["epoch"], tried(again)) == (size, 2, [])
    assert f"batch size max -> {size}: found when the run began; a resumed run keeps it" in again.events
    assert again.used.lr == first.used.lr
    fixed = tmp_path / "fixed"
    fit(fixed, "memory.limit=60MiB", batch="4")
    with pytest.raises(ConfigError, match=r"the one that is resumed has batch size 4; give trainer.batch_size a num"):
        fit(fixed, "memory.limit=60MiB", "trainer.epochs=2", "resume=auto")


def test_each_stage_has_its_own(tmp_path: Path) -> None:
    stages = "phases.stages=[{name: a, overrides: []}, {name: b, overrides: ['trainer.ema_decay=0.9']}]"
    result = fit(tmp_path, "memory.limit=60MiB", stages)
    found = [event for event in result.events if event.startswith("batch size max")]
    assert len(found) == 2
    assert result.used.batch_size == int(found[1].split()[4].rstrip(":")) <= int(found[0].split()[4].rstrip(":"))


def test_a_signal_ends_the_search(tmp_path: Path) -> None:
    def make(config: ModelConfig, classes: int) -> nn.Module:
        os.kill(os.getpid(), signal.SIGTERM)
        return Conv(classes)

    with pytest.raises(Stopped, match="stopped by SIGTERM; no training has begun, and nothing is saved"):
        fit(tmp_path, "memory.limit=60MiB", model=make)


# -- settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.batch_size=maximum"], "trainer.batch_size=maximum is neither a whole number above 0 nor max"),
        (["trainer.batch_size=2.5"], "trainer.batch_size=2.5 is neither"),
        (["trainer.batch_size=true"], "trainer.batch_size=True is neither"),
        (["trainer.batch_size=null"], "trainer.batch_size=None is neither"),
        (
            ["trainer.batch_size=max", "trainer.micro_batch_size=4"],
            "trainer.batch_size=max with trainer.micro_batch_size=4: in micro-batches a batch of any size fits",
        ),
        (
            ["ladder.rungs=[{name: a, overrides: ['trainer.batch_size=max']}]"],
            "rung 'a': 'trainer.batch_size=max': the batch size of a rung is a whole number above 0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(compose_config(overrides))
    assert message in str(caught.value)
    assert ";" not in str(caught.value).replace("fits; give", ""), "said once"


def test_without_a_limit_there_is_no_largest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a limit on memory.*set memory.limit=2GiB, or give"):
        fit(tmp_path, "memory.limit=none")
    with pytest.raises(ConfigError, match="here, give a number"):
        predict(compose_config(["trainer.batch_size=max"]))


def test_rungs_follow_the_number() -> None:
    ladder = resolve(compose_config(["trainer.batch_size=max"]), 12, "so it is")
    by_name = {rung.name: rung for rung in ladder}
    assert "raise batch_size from 12 to 16" in by_name["batch-16"].passed_over
    assert recipe(by_name["batch-8"].settings).batch_size == 8
    assert ladder[0].notes[0] == "batch size max -> 12: so it is"
    assert ladder[0].settings.optimizer.lr == pytest.approx(1e-3 / math.sqrt(2))
    smaller = by_name["image-192"].settings
    assert smaller.optimizer.lr == pytest.approx(1e-3 * math.sqrt(8 / 24))
    asked = resolve(compose_config([]))[0].settings
    why = {change.key: change.why for change in changes(asked, by_name["batch-8"])}
    assert "sqrt rule for batch size 24 -> 8" in why["optimizer.lr"]


# -- task=plan


def test_a_plan_begins_with_the_largest_that_is_predicted(tmp_path: Path) -> None:
    overrides = ["model.name=mobilenetv3_small_050", "data.image_size=64", "memory.limit=100MiB", "device=cpu"]
    made = run_plan(compose_config([*overrides, "trainer.batch_size=max"]), tmp_path)
    config = resolve(compose_config(overrides))[0].settings
    predictor = Predictor(spec_of(config))
    needs = []
    for size in range(2, 200):
        config.trainer.batch_size = size
        needs.append(predictor.predict(config).min_capacity_bytes or 0)
        if needs[-1] > 100 * MiB:
            break
    assert f"batch {size - 1}, image 64" in made.rows[0].recipe
    assert f"batch {size - 1}, image 64" in json.loads((tmp_path / "plan.json").read_text())["rungs"][0]["recipe"]
    assert (made.rows[0].min_capacity_bytes or 0) <= 100 * MiB


@pytest.mark.parametrize("limit", [60, 61, 64])
def test_what_is_proven_is_trained_to_the_end(limit: int, tmp_path: Path) -> None:
    """At the very limit it matters where in memory the optimizer's state lies."""
    small = ["model.name=mobilenetv3_small_050", "data.image_size=64", "trainer.batch_size=max", "device=cpu"]
    data = ["data=fakedata", "data.train.size=200", "data.val.size=8", "data.num_workers=0", "model.num_classes=10"]
    result = Trainer(compose_config([*small, *data, f"memory.limit={limit}MiB"]), output_dir=tmp_path).fit()
    assert result.rung == "requested"
    assert [entry.outcome for entry in result.attempts if entry.rung == "requested"] == ["fits"]
    assert result.used.batch_size > 24


def test_a_plan_lands_where_training_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = ["model.name=mobilenetv3_small_050", "data.image_size=96", "trainer.batch_size=max", "device=cpu"]
    data = ["data=fakedata", "data.train.size=48", "data.val.size=8", "data.num_workers=0", "model.num_classes=10"]
    cfg = compose_config([*small, *data, "memory.limit=100MiB", "ladder=none"])
    cfg.ladder.rungs = [RungConfig("sure", ["trainer.batch_size=8"])]
    with caplog.at_level("INFO"):
        made = run_plan(cfg, tmp_path)
    assert [row.verdict for row in made.rows] == ["unsure", "fits"]
    assert (made.lands_on, made.perhaps) == ("requested", ())
    assert "lands on rung requested\n" in caplog.text
    assert "the largest that is predicted to fit in 100 MiB; training proves it, or one near it" in caplog.text
    assert Trainer(cfg, output_dir=tmp_path).fit().rung == "requested"


def test_a_plan_in_which_not_one_sample_fits_does_not_land_on_it(tmp_path: Path) -> None:
    small = ["model.name=mobilenetv3_small_050", "data.image_size=96", "trainer.batch_size=max", "device=cpu"]
    made = run_plan(compose_config([*small, "memory.limit=4MiB", "ladder=none"]), tmp_path)
    assert (made.rows[0].verdict, made.lands_on, made.perhaps) == ("hopeless", None, ())


def test_a_table_of_batch_sizes_is_the_same(tmp_path: Path) -> None:
    small = ["model.name=mobilenetv3_small_050", "batch=[8]", "size=[64]", "memory.limit=100MiB", "device=cpu"]
    asked = [run_memory(compose_config([*small, *more]), tmp_path) for more in ([], ["trainer.batch_size=max"])]
    assert asked[0] == asked[1]


def test_a_plan_needs_a_card_or_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a card \(card=rtx2060\) or a limit"):
        run_plan(compose_config(["trainer.batch_size=max", "memory.limit=none"]), tmp_path)
