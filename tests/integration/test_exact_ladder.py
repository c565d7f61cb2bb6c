"""`ladder=exact`: the asked recipe, bit for bit, in less memory; and what is said where another ladder gave it up."""

from __future__ import annotations

import json
import logging
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, Transaction, compose_config, predict, recompute
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.cli.plan import plan_table, run_plan
from adaptive_trainer.config.schema import RungConfig
from adaptive_trainer.errors import ConfigError, Interrupted, LadderExhausted
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.prediction.estimator import Prediction
from adaptive_trainer.report.result import Result
from adaptive_trainer.step.update import Update
from tests.support import exact_advice

MiB = 2**20
BASE = (
    "trainer.batch_size=48", "trainer.epochs=3", "data.image_size=32", "data.transforms=none", "data.num_workers=0",
)  # fmt: skip
HALF = {"half": ["trainer.batch_size=24"], "eighth": ["trainer.batch_size=6"]}
SAVED = ("model", "ema", "optimizer", "scaler", "buffers", "meters", "random", "position")


class Images(Dataset[Any]):
    """Random images in three classes."""

    classes = ("a", "b", "c")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 3


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([norm(16), norm(16)])

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.norms[0](self.first(x)))
        return x + nn.functional.silu(self.norms[1](self.second(inner)))


def network(norm: Callable[[int], nn.Module], depth: int = 10) -> nn.Module:
    blocks = [Block(norm) for _ in range(depth)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    )


def with_batch_norm(config: Any, classes: int) -> nn.Module:
    return network(nn.BatchNorm2d)


def shallow(config: Any, classes: int) -> nn.Module:
    return network(nn.BatchNorm2d, depth=4)


def with_group_norm(config: Any, classes: int) -> nn.Module:
    return network(lambda channels: nn.GroupNorm(4, channels))


def fit(
    folder: Path, *overrides: str, model: Any = with_batch_norm, steps: dict[str, list[str]] | None = None
) -> Result:
    cfg = compose_config([*BASE, *overrides])
    if steps is not None:
        cfg.ladder.rungs = [RungConfig(name, texts) for name, texts in steps.items()]
    return Trainer(cfg, model=model, train_data=Images(120), val_data=Images(24), output_dir=folder).fit()


def saved(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of two checkpoints that are not the same bits."""
    return [part for part in SAVED if not _same(one[part], other[part])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def outcomes(result: Result) -> list[tuple[str, str]]:
    return [(entry.rung, entry.outcome) for entry in result.attempts]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of the run as it was asked for, with all the memory that it wants."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(folder, "ladder=none", "memory.limit=none")
    return saved(folder)


def test_a_third_of_the_memory_and_the_same_bits(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    asked = fit(tmp_path / "asked", "ladder=none", "memory.limit=1GiB").attempts[0].predicted_bytes
    assert asked is not None
    result = fit(tmp_path / "exact", "ladder=exact", f"memory.limit={asked // 3}b")
    assert outcomes(result) == [("requested", "skipped"), ("recompute", "fits")]
    assert differing(saved(tmp_path / "exact"), undisturbed) == []
    assert [change.key for change in result.changes] == ["trainer.recompute"]
    plan = result.changes[0].used
    assert result.used.reported()["recompute"] == plan == saved(tmp_path / "exact")["config"]["trainer"]["recompute"]
    assert result.changes[0].why.startswith("recomputation of rung recompute, planned for ")
    assert plan not in ("auto", "most", "none")


@cache
def needs() -> dict[str, int]:
    """The smallest room of the plans, in bytes, on a simulated card."""
    found = {}
    for plan in ("none", "cheap", "blocks", "most"):
        shape = predict(with_batch_norm(None, 3), torch.optim.AdamW, (48, 3, 32, 32), device="cpu", recompute=plan)
        assert shape.min_capacity_bytes is not None
        found[plan] = shape.min_capacity_bytes
    return found


@pytest.fixture
def room_after(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes of the simulated card from the end of updates on, by number, as other programs begin and end."""
    after: dict[int, int] = {}
    commit = Update.commit

    def committed(update: Update, position: Any) -> None:
        commit(update, position)
        if not update._is_dry_run and (size := after.pop(update.state.updates, None)):
            device = update.capacity.simulated
            assert device is not None
            device.empty_cache()  # what is reserved would stay this process's own
            device.capacity = device._allocator.capacity = size

    def room(capacity: Capacity) -> int | None:
        return None if capacity.simulated is None else capacity.simulated.capacity

    monkeypatch.setattr(Update, "commit", committed)
    monkeypatch.setattr(Capacity, "room", room)
    return after


def fits_in(need: int) -> int:
    """A room in which a prediction of this need is sure to fit."""
    return need + 24 * MiB


def test_memory_taken_in_mid_run_is_answered_by_another_plan(
    tmp_path: Path, undisturbed: dict[str, Any], room_after: dict[int, int]
) -> None:
    """First what is cheap is recomputed; when another program takes memory, more; then training ends with the bits."""
    least = needs()
    room_after[4] = fits_in(least["blocks"])
    result = fit(tmp_path, "ladder=exact", f"memory.limit={fits_in(least['cheap'])}b")
    assert outcomes(result) == [
        ("requested", "skipped"), ("recompute", "fits"), ("recompute", "oom"), ("recompute", "fits"),
    ]  # fmt: skip
    assert result.attempts[2].phase.endswith("after update 4")
    assert "rung recompute is planned anew for the memory that is left, from this update on" in result.events
    assert differing(saved(tmp_path), undisturbed) == []


def test_where_the_plan_stays_the_same_the_next_rung_is_the_answer(tmp_path: Path, room_after: dict[int, int]) -> None:
    least = needs()
    room_after[4] = 12 * MiB
    with pytest.raises(LadderExhausted, match="short of") as caught:
        fit(tmp_path, "ladder=exact", f"memory.limit={least['most']}b")
    assert "rung offload is predicted to need" in str(caught.value)
    assert "planned anew" not in (tmp_path / "result.json").read_text()


def test_with_more_room_it_climbs_to_a_faster_plan_and_to_none(tmp_path: Path, room_after: dict[int, int]) -> None:
    least = needs()
    sizes = {plan: fits_in(need) for plan, need in least.items()}
    room_after |= {2: sizes["cheap"], 6: sizes["none"]}
    long = ("ladder=exact", "ladder.climb=true", "trainer.epochs=6")
    result = fit(tmp_path / "climbs", *long, f"memory.limit={sizes['blocks']}b")
    fit(tmp_path / "whole", "ladder=none", "trainer.epochs=6", "memory.limit=none")
    assert (result.rung, result.changes) == ("requested", [])
    used = [entry.predicted_bytes for entry in result.attempts if entry.outcome == "fits"]
    assert len(used) == 3
    assert used == sorted(used, key=lambda need: need or 0)
    assert used[-1] == least["none"]
    assert differing(saved(tmp_path / "climbs"), saved(tmp_path / "whole")) == []


def test_memory_that_was_taken_and_given_back_is_used_by_the_faster_plan(
    tmp_path: Path, room_after: dict[int, int]
) -> None:
    """The rung above has no more room than when it was passed over: the rung itself is planned anew, twice."""
    least = needs()
    sizes = {plan: fits_in(need) for plan, need in least.items()}
    room_after |= {2: sizes["blocks"], 6: sizes["cheap"]}
    how = ("ladder=exact", "ladder.climb=true", "trainer.epochs=6", f"memory.limit={sizes['cheap']}b")
    result = fit(tmp_path, *how)
    used = [entry.predicted_bytes or 0 for entry in result.attempts if entry.outcome == "fits"]
    assert used[0] > used[1]
    assert used[2] == used[0]
    assert any("there is room again" in event for event in result.events)


def test_a_plan_that_fails_its_dry_run_is_made_for_less(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program holds a third of the card, which nobody is told."""
    least = needs()
    monkeypatch.setattr(Capacity, "room", lambda self: None if self.bytes is None else fits_in(least["none"]))
    result = fit(tmp_path, "ladder=exact", f"memory.limit={fits_in(least['blocks'])}b")
    assert outcomes(result)[:2] == [("requested", "oom"), ("recompute", "oom")]
    assert outcomes(result)[-1] == ("recompute", "fits")
    tried = [entry.predicted_bytes or 0 for entry in result.attempts]
    assert tried == sorted(set(tried), reverse=True)
    assert differing(saved(tmp_path), undisturbed) == []


def test_batch_norm_passes_over_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(LadderExhausted) as caught:
        fit(tmp_path, "ladder=exact", "memory.limit=12MiB")
    said = str(caught.value)
    assert "micro-12-rounded: skipped: trainer.micro_batch_size=12, trainer.recompute=auto is left out" in said
    assert said.count("oom in") == 1  # the last rung that may be tried is
    short = re.search(r"short of (\d+) MiB: rung offload is predicted to need (\d+) MiB, and there are 12", said)
    assert short is not None
    assert int(short[1]) == int(short[2]) - 12
    assert caught.value.exit_code == 3


def test_other_networks_train_in_micro_batches_up_to_rounding(tmp_path: Path) -> None:
    fit(tmp_path / "asked", "ladder=none", "memory.limit=none", model=with_group_norm)
    result = fit(tmp_path / "exact", "ladder=exact", "memory.limit=30MiB", model=with_group_norm)
    assert result.rung.endswith("-rounded")
    why = {change.key: change.why for change in result.changes}
    assert why["trainer.micro_batch_size"] == "micro-batches give the gradients of the whole batch, up to rounding"
    assert set(why) <= {"trainer.micro_batch_size", "trainer.recompute"}
    one, other = (saved(tmp_path / name)["model"] for name in ("asked", "exact"))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


def test_rungs_of_ones_own_are_exact_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = {"small": ["trainer.batch_size=8", "trainer.recompute=blocks"], "amp": ["trainer.precision=bf16"]}
    room = fits_in(needs()["blocks"])
    with caplog.at_level(logging.INFO, logger="adaptive_trainer"):
        result = fit(tmp_path, "ladder=none", "ladder.exact=true", f"memory.limit={room}b", steps=steps)
    assert (result.rung, result.used.batch_size) == ("small", 48)
    assert "would change what is computed (trainer.batch_size), and ladder.exact keeps that" in caplog.text


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_run_that_was_planned_anew_goes_on_where_it_stopped(
    end: str, tmp_path: Path, undisturbed: dict[str, Any], room_after: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = needs()
    room_after[2] = fits_in(least["blocks"])
    commit = Update.commit

    def committed(update: Update, position: Any) -> None:
        commit(update, position)
        if not update._is_dry_run and update.state.updates == 4 and end == "stopped":
            signal.raise_signal(signal.SIGTERM)
        elif not update._is_dry_run and update.state.updates == 5:
            raise RuntimeError("the power is cut")

    limits = ("ladder=exact", f"memory.limit={fits_in(least['cheap'])}b", "trainer.checkpoint_every=2")
    with monkeypatch.context() as patched:
        patched.setattr(Update, "commit", committed)
        with pytest.raises(Interrupted if end == "stopped" else RuntimeError):
            fit(tmp_path, *limits)
    before = saved(tmp_path)["config"]["trainer"]["recompute"]
    result = fit(tmp_path, f"resume={tmp_path / 'checkpoints' / 'last.pt'}")
    after = saved(tmp_path)
    # The card is as large as at first again: there is a faster plan, which is said in few words.
    assert before != after["config"]["trainer"]["recompute"]
    [said] = [event for event in result.events if "another trainer.recompute" in event]
    assert len(said) < 200
    assert differing(after, undisturbed) == []


def test_each_stage_is_planned(tmp_path: Path) -> None:
    stages = '[{name: a, overrides: ["trainer.epochs=1"]}, {name: b, overrides: ["trainer.epochs=2"]}]'
    room = fits_in(needs()["blocks"])
    for name, how in (
        ("exact", ("ladder=exact", f"memory.limit={room}b")),
        ("whole", ("ladder=none", "memory.limit=none")),
    ):
        result = fit(tmp_path / name, f"phases.stages={stages}", *how)
        rung = "recompute" if name == "exact" else "requested"
        assert [stage["rung"] for stage in result.stages] == [rung, rung]
    assert differing(saved(tmp_path / "exact"), saved(tmp_path / "whole")) == []


def test_the_largest_batch_is_larger_with_recomputation(tmp_path: Path) -> None:
    found = {}
    for plan in ("none", "blocks", "auto"):
        how = ("ladder=none", "memory.limit=30MiB", "trainer.batch_size=max", "trainer.epochs=1")
        found[plan] = fit(tmp_path / plan, f"trainer.recompute={plan}", *how, model=shallow)
    sizes = {plan: result.used.batch_size for plan, result in found.items()}
    assert sizes["none"] < sizes["blocks"] <= sizes["auto"]
    assert (
        ":" in str(found["auto"].used.reported()["recompute"]) or found["auto"].used.reported()["recompute"] != "auto"
    )


# -- what is said of it


@pytest.fixture
def exact_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(exact_advice.ASKED, "1")


@pytest.mark.usefixtures("exact_is_planned")
def test_a_run_that_gave_up_the_batch_says_what_would_have_kept_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    least = needs()
    with caplog.at_level(logging.INFO, logger="adaptive_trainer"):
        result = fit(tmp_path / "half", f"memory.limit={fits_in(least['cheap'])}b", "ladder=none", steps=HALF)
    assert result.rung == "half"
    [line] = [line for line in caplog.text.splitlines() if line.startswith("ladder=exact would keep")]
    said = re.fullmatch(r"ladder=exact would keep batch 48 \(predicted: (\d+) MiB, (\d\.\d+) x the time\)", line)
    assert said is not None
    assert int(said[1]) * MiB <= fits_in(least["cheap"])
    assert 1 <= float(said[2]) < 2
    assert len(line) <= 80


@pytest.mark.usefixtures("exact_is_planned")
@pytest.mark.parametrize(
    "how", [["memory.limit=none"], ["ladder.exact=true", "memory.limit=1GiB"], ["memory.limit=14MiB"]]
)
def test_else_nothing_is_said(how: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = HALF if how[0] != "memory.limit=14MiB" else {"eighth": ["trainer.batch_size=2"]}
    with caplog.at_level(logging.INFO, logger="adaptive_trainer"):
        fit(tmp_path, "ladder=none", *how, steps=steps)
    assert "ladder=exact" not in caplog.text


@pytest.mark.usefixtures("exact_is_planned")
def test_a_plan_says_what_is_recomputed_and_what_would_be_kept(tmp_path: Path) -> None:
    small = ["model.name=test_efficientnet", "data.image_size=160", "trainer.batch_size=64", "card=rtx2060"]
    whole = run_plan(compose_config([*small, "ladder=none"]), tmp_path / "whole").rows[0].min_capacity_bytes
    assert whole is not None
    limit = f"memory.limit={whole * 7 // 10}b"
    exact = run_plan(compose_config([*small, limit, "ladder=exact"]), tmp_path / "exact")
    assert (exact.lands_on, exact.exact) == ("recompute", "")
    row = next(row for row in exact.rows if row.rung == "recompute")
    assert row.plan not in ("auto", "none", "")
    assert row.added_time is not None
    assert exact.rows[-1].added_time is not None  # `offload`
    assert exact.rows[-1].added_time > 1
    assert f"{row.added_time:.2f} times the time" in " ".join(plan_table(exact).split())
    assert json.loads((tmp_path / "exact" / "plan.json").read_text())["rungs"][1]["plan"] == row.plan
    usual = run_plan(compose_config([*small, limit]), tmp_path / "usual")
    assert usual.lands_on == "batch-16"
    assert usual.exact.startswith("ladder=exact would keep batch 64 (predicted: ")
    assert plan_table(usual).endswith(usual.exact)


# -- in Python


def test_predict_says_which_plan_makes_a_network_fit() -> None:
    model, shape, least = with_batch_norm(None, 3), (48, 3, 32, 32), needs()

    def found(**how: Any) -> Prediction:
        return predict(model, torch.optim.AdamW, shape, device="cpu", **how)

    assert found().plan == "none"
    assert found(recompute="auto", limit=fits_in(least["none"])).plan == "none"
    fitting = found(recompute="auto", limit=fits_in(least["cheap"]))
    assert (fitting.min_capacity_bytes or 0) <= fits_in(least["cheap"])
    assert fitting.plan not in ("auto", "none")
    assert fitting.added_time is not None
    assert fitting.added_time > 1
    most = found(recompute="most")
    assert (most.min_capacity_bytes or 0) <= least["blocks"]
    with pytest.raises(ConfigError, match=r"trainer.recompute=all is none of none, auto, cheap, blocks, most, and no"):
        found(recompute="all")
    with pytest.raises(ConfigError, match="Sequential has no module 1000"):
        found(recompute="whole:1000")
    recompute(model, most.plan)
    assert replace(found(), seconds=0.0, plan="", added_time=1.0) == replace(most, seconds=0.0, plan="", added_time=1.0)


def test_a_network_of_ones_own_is_recomputed_bit_for_bit() -> None:
    ends = []
    for plan in ("none", "blocks", "whole:3|4+cheap:rest"):
        torch.manual_seed(0)
        model = with_batch_norm(None, 3)
        recompute(model, plan)
        optimizer = torch.optim.AdamW(model.parameters())
        transaction = Transaction(model, optimizer)
        for _ in range(3):
            with transaction:
                model(torch.rand(4, 3, 32, 32)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][key], end[key]) for end in ends[1:] for key in end)
    for wrong in ("auto", "all"):
        with pytest.raises(ConfigError, match=f"recompute was given '{wrong}'; allowed are none, cheap, blocks and"):
            recompute(model, wrong)


def test_a_plan_of_another_network_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.recompute: Sequential has no module blocks.0"):
        fit(tmp_path, "ladder=none", "trainer.recompute='most:blocks.0'")
    on_a_rung = Trainer(compose_config(["data=fakedata"]), output_dir=tmp_path)
    on_a_rung.cfg.ladder.rungs = [RungConfig("x", ["trainer.recompute='most:layers.1'"])]
    with pytest.raises(ConfigError, match=r"rung 'x': trainer\.recompute: EfficientNet has no module layers\.1"):
        on_a_rung.fit()
    misspelt = Trainer(compose_config(["data=fakedata", "trainer.recompute='mst:blocks.0'"]), output_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"'mst:blocks\.0' is no part of a plan"):
        misspelt.fit()
