"""Plans of whole ladders, the tables and files made of them, and what is remembered on disk."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from adaptive_trainer.cli.plan import memory_table, plan_table, run_memory, run_plan
from adaptive_trainer.config.overrides import compose_config, config_dir, typed
from adaptive_trainer.config.schema import CardConfig, Config, ModelConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch
from adaptive_trainer.errors import ConfigError, LadderExhausted, ModelError
from adaptive_trainer.ladder.resolve import resolve, stored_size
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.planning.cache import Measurement, PlanCache, versions
from adaptive_trainer.planning.device_spec import DeviceSpec, card_of, spec_of
from adaptive_trainer.planning.ladder_plan import plan
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.prediction.estimator import Prediction, verdict
from adaptive_trainer.training.trainer import Trainer
from adaptive_trainer.utils.files import default_folder

MiB = 2**20
GiB = 2**30
SMALL = ["model.name=mobilenetv3_small_100", "data.image_size=64", "trainer.batch_size=8"]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a card says")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))


def settings(*overrides: str) -> DictConfig:
    return compose_config(overrides)


def first(*overrides: str) -> Config:
    return resolve(compose_config([*overrides, "ladder=none"]))[0].settings


def card(capacity: int | None) -> DeviceSpec:
    return DeviceSpec("a card", True, (8, 6), capacity, 450 * MiB)


# -- what is planned for


def test_a_named_card_less_its_context() -> None:
    spec = spec_of(first("card=rtx2060"))
    assert (spec.cuda, spec.capability, spec.capacity) == (True, (7, 5), 6 * GiB - spec.context)
    assert 300 * MiB < spec.context < 700 * MiB


def test_a_limit_is_on_the_allocator() -> None:
    assert spec_of(first("memory.limit=2GiB", "card=rtx2060")).capacity == 2 * GiB
    assert spec_of(first("memory.limit=0.5", "card=rtx2060")).capacity == 3 * GiB
    whole = spec_of(first("memory.limit=6GiB", "card=rtx2060"))
    assert whole.capacity == 6 * GiB - whole.context


@NO_CUDA
def test_a_limit_without_a_card() -> None:
    spec = spec_of(first("memory.limit=6GiB"))
    assert (spec.cuda, spec.capacity) == (True, 6 * GiB)
    assert spec_of(first()).capacity is None
    with pytest.raises(ConfigError, match=r"fraction of a card: name one with card="):
        spec_of(first("memory.limit=0.5"))


def test_a_limit_above_the_card() -> None:
    with pytest.raises(ConfigError, match="more than all of NVIDIA GeForce RTX 2060"):
        spec_of(first("memory.limit=7GiB", "card=rtx2060"))


def test_the_simulated_card() -> None:
    spec = spec_of(first("device=cpu", "memory.limit=300MiB"))
    assert (spec.cuda, spec.capacity, spec.context) == (False, 300 * MiB, 0)
    assert spec_of(first("device=cpu")).capacity == 512 * MiB
    assert spec_of(first("device=cpu:0")) == spec_of(first("device=cpu"))
    assert spec_of(first("device=cpu", "memory.limit=none")).capacity is None


@pytest.mark.parametrize("path", sorted(Path(config_dir(), "card").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cards(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = card_of(typed(settings(f"card={path.stem}", "ladder=none")).card)
    assert found is not None
    assert found.capacity is not None
    assert 2 * GiB < found.capacity + found.context < 200 * GiB
    assert (6, 0) <= found.capability <= (12, 1)
    assert all("https://" in line for line in text.splitlines() if not line.startswith("name:")), "a figure's source"


@pytest.mark.parametrize(
    "wrong",
    [CardConfig("x"), CardConfig("x", -1, "8.6"), CardConfig("x", 1024, "86"), CardConfig("x", 1024, "eight.six")],
)
def test_a_card_that_makes_no_sense(wrong: CardConfig) -> None:
    with pytest.raises(ConfigError, match=r"card=x: a card has memory_mib"):
        card_of(wrong)
    assert card_of(CardConfig()) is None
    with pytest.raises(ConfigError, match="card=x: CUDA itself takes 450 MiB, and the card has 300 MiB"):
        card_of(CardConfig("x", 300, "8.6"))


# -- plans


@pytest.fixture(scope="module")
def default_plan() -> Any:
    """The default ladder on a card on which some rungs fit, and one is unsure."""
    ladder = resolve(compose_config())
    predictor = Predictor(card(1500 * MiB))
    return plan(ladder, Planner(predictor)), ladder, predictor


@pytest.mark.long
def test_the_default_ladder(default_plan: Any) -> None:
    made, ladder, _ = default_plan
    assert [row.rung for row in made.rows] == [rung.name for rung in ladder]
    assert [row.verdict for row in made.rows] == ["hopeless", "unsure", *["fits"] * 7]
    assert (made.lands_on, made.perhaps) == ("batch-8", ("batch-16",))
    least = [row.min_capacity_bytes for row in made.rows]
    assert least == sorted(least, reverse=True)
    for row in made.rows:
        assert row.live_bytes <= row.allocated_bytes <= row.reserved_bytes
        assert row.min_card_bytes == row.min_capacity_bytes + 450 * MiB


@pytest.mark.long
def test_it_lands_where_the_verdicts_say(default_plan: Any) -> None:
    made, ladder, predictor = default_plan
    for capacity, lands_on, perhaps in ((10 * GiB, "requested", ()), (40 * MiB, None, ())):
        predictor.spec = replace(made.spec, capacity=capacity)
        found = plan(ladder, Planner(predictor))
        assert (found.lands_on, found.perhaps) == (lands_on, perhaps)


def test_passed_over_and_refused_rungs_are_skipped() -> None:
    asked = resolve(compose_config(["model.name=vit_tiny_patch16_224", "trainer.batch_size=2", "ladder=none"]))[0]
    smaller = resolve(compose_config(["model.name=vit_tiny_patch16_224", "data.image_size=160", "ladder=none"]))[0]
    ladder = [asked, Rung("more", asked.settings, (), "it would raise batch_size"), replace(smaller, name="image-160")]
    made = plan(ladder, Planner(Predictor(card(10 * GiB))))
    assert [row.verdict for row in made.rows] == ["fits", "skipped", "skipped"]
    assert made.rows[1].reason == "it would raise batch_size"
    assert "refuses data.image_size=160" in made.rows[2].reason


@pytest.mark.long
def test_a_larger_network_is_no_step_down(default_plan: Any) -> None:
    ladder = resolve(compose_config([*SMALL, "model.name=mobilenetv3_small_050"]))
    rows = {row.rung: row for row in plan(ladder, Planner(Predictor(card(GiB)))).rows}
    for rung in ("mobilenetv3-large", "mobilenetv3-small"):
        said = "it is no step down from mobilenetv3_small_050: it is predicted to need"
        assert (rows[rung].verdict, rows[rung].reason[: len(said)]) == ("skipped", said)
    usual, _, _ = default_plan
    assert usual.rows[-1].verdict != "skipped"


class DataDependent(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores if scores.sum() > 0 else scores[scores.argmax(1) > 2]


def test_what_cannot_be_traced_is_unknown_and_may_hold() -> None:
    ladder = resolve(compose_config([*SMALL, "ladder=none"]))
    made = plan(ladder, Planner(Predictor(card(GiB), make_model=lambda config, classes: DataDependent(classes))))
    (row,) = made.rows
    assert (row.verdict, row.live_bytes) == ("unknown", None)
    assert row.reason
    assert (made.lands_on, made.perhaps) == (None, ("requested",))
    assert "requested may fit and will be tried first" in plan_table(made)


def test_an_unknown_optimizer_is_unknown() -> None:
    found = Predictor(card(GiB)).predict(first(*SMALL, "optimizer.name=adamww"))
    assert "unknown optimizer.name=adamww" in found.reason


@pytest.mark.long
def test_what_changes_the_need_changes_the_prediction() -> None:
    predictor = Predictor(card(GiB))
    plain = predictor.predict(first(*SMALL)).live_bytes
    assert plain is not None

    def need(*overrides: str) -> int:
        return predictor.predict(first(*SMALL, *overrides)).live_bytes or 0

    assert need("trainer.ema_decay=0.9") > plain
    assert need("trainer.micro_batch_size=4") < plain
    assert need("trainer.recompute=blocks") < plain
    assert need("trainer.offload=true") < plain
    assert need("+optimizer.kwargs.foreach=true") > plain  # an allocating step needs copies to be undone
    assert need("model.num_classes=5000") > plain
    assert need("optimizer.lr=0.5") == plain
    large = predictor.predict(first(*SMALL, "trainer.eval_batch_size=400"))
    assert large.live_bytes is not None
    assert large.live_bytes > plain
    assert large.min_capacity_bytes == predictor.predict(first(*SMALL)).min_capacity_bytes  # evaluation can be halved


def test_micro_batches_of_one_are_joined_only_for_batch_norm() -> None:
    predictor = Predictor(card(GiB))
    small = (*SMALL, "trainer.batch_size=4")
    two, one = (predictor.predict(first(*small, f"trainer.micro_batch_size={n}")) for n in (2, 1))
    assert one.min_capacity_bytes == two.min_capacity_bytes


# -- files


def test_run_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made = run_plan(settings(*SMALL, "ladder=none", "card=rtx2060"), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert content["lands_on"] == "requested"
    assert content["capacity_bytes"] + content["context_bytes"] == 6 * GiB
    (row,) = content["rungs"]
    keys = ("rung", "verdict", "live_bytes", "allocated_bytes", "reserved_bytes", "min_capacity_bytes", "seconds")
    assert all(row[key] is not None for key in keys)
    assert row["min_capacity_bytes"] == made.rows[0].min_capacity_bytes
    assert "lands on rung requested" in caplog.text
    assert "10 classes are assumed" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


def test_a_plan_counts_the_folder_that_would_be_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("cat", "dog", "owl"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{number}.png")
    asked = settings("data=imagefolder", f"data.root={tmp_path / 'photos'}", *SMALL[1:], "ladder=none", "card=rtx2060")
    asked.trainer.batch_size = 8
    three = run_plan(asked, tmp_path / "out").rows[0]
    assert "data: 10 training and 2 validation images, held out of the training set; 3 classes: cat, dog" in caplog.text
    assert "classes are assumed" not in caplog.text
    asked.model.num_classes = 300
    assert (three.live_bytes or 0) < (run_plan(asked, tmp_path / "out").rows[0].live_bytes or 0)
    asked.trainer.batch_size = 11
    with pytest.raises(ConfigError, match="above the 10 samples of the training set"):
        run_plan(asked, tmp_path / "out")


def test_the_table_says_what_a_verdict_needs_and_what_is_short() -> None:
    ladder = resolve(compose_config([*SMALL, "ladder=none"]))
    unknown = plan(ladder, Planner(Predictor(card(None))))
    needed = "a verdict needs a card (card=rtx2060) or a limit (memory.limit=6GiB)"
    assert needed in " ".join(plan_table(unknown).split())
    short = plan(ladder, Planner(Predictor(card(4 * 2**20))))
    assert re.fullmatch(
        r"no rung fits: the smallest, requested, is predicted to need \d+ MiB, \d+ MiB too much", short.landing
    )


@NO_CUDA
def test_a_plan_without_a_card_is_for_what_training_would_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="adaptive_trainer")
    made = run_plan(settings(*SMALL, "ladder=none"), tmp_path)
    with limited(torch.device("cpu"), None) as capacity:
        assert (made.spec.cuda, made.spec.capacity) == (False, capacity.bytes)
    on_cpu = run_plan(settings(*SMALL, "ladder=none", "device=cpu"), tmp_path)
    assert made.rows[0].min_capacity_bytes == on_cpu.rows[0].min_capacity_bytes
    assert made.lands_on == "requested"
    assert caplog.text.count("the simulated card that training would take; card=rtx2060 names another") == 1
    assert run_plan(settings(*SMALL, "ladder=none", "memory.limit=2GiB"), tmp_path).spec.cuda


def test_run_plan_refuses_a_size_that_the_network_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"refuses data.image_size=100"):
        run_plan(settings("model.name=vit_tiny_patch16_224", "data.image_size=100", "ladder=none"), tmp_path)


@pytest.mark.long
def test_run_memory(tmp_path: Path) -> None:
    def measure(config: Config, num_classes: int) -> tuple[int, int] | None:
        assert num_classes == 10
        return None if config.trainer.batch_size == 8 else (50 * MiB, 60 * MiB)

    cfg = settings(*SMALL, "ladder=none", "memory.limit=6GiB", "batch=[4,8]", "size=[64,96]")
    cells = run_memory(cfg, tmp_path, measure)
    assert [(cell.batch, cell.size) for cell in cells] == [(4, 64), (4, 96), (8, 64), (8, 96)]
    assert cells[0].allocated_bytes is not None
    assert cells[3].allocated_bytes is not None
    assert cells[0].allocated_bytes < cells[3].allocated_bytes
    with (tmp_path / "memory.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["measured_allocated_bytes"] for row in rows] == [str(50 * MiB)] * 2 + [""] * 2
    assert [int(row["allocated_bytes"]) for row in rows] == [cell.allocated_bytes for cell in cells]
    text = (tmp_path / "memory.txt").read_text(encoding="utf-8")
    assert memory_table(cells) in text
    assert "[50]" in text
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_run_memory_refuses_a_network_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown model\.name=mobilenetv9"):
        run_memory(settings(*SMALL, "model.name=mobilenetv9"), tmp_path)


@pytest.mark.parametrize("batch", ["[]", "[0]", "[4,-1]"])
def test_run_memory_wants_numbers_above_0(tmp_path: Path, batch: str) -> None:
    with pytest.raises(ConfigError, match=r"batch=.* is no list of whole numbers"):
        run_memory(settings(*SMALL, f"batch={batch}", "size=[64]"), tmp_path)


def test_a_size_that_the_network_refuses_is_told_in_the_table(tmp_path: Path) -> None:
    cells = run_memory(
        settings("model.name=vit_tiny_patch16_224", "memory.limit=6GiB", "batch=[2]", "size=[100,224]"), tmp_path
    )
    assert [cell.verdict for cell in cells] == ["unknown", "fits"]
    assert "refuses data.image_size=100" in memory_table(cells)


# -- the cache

PREDICTION = Prediction(1, 2, 3, 4, 0.5)
KEY = {"model": "m", "batch": 8}


def test_a_second_plan_comes_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = resolve(compose_config([*SMALL, "ladder=none"]))
    cache = PlanCache(tmp_path)
    made = plan(ladder, Planner(Predictor(card(GiB), cache=cache)))
    monkeypatch.setattr("adaptive_trainer.planning.predictor.predict", None)  # it would have to be called
    again = plan(ladder, Planner(Predictor(card(GiB), cache=cache)))
    assert [replace(row, seconds=0.0) for row in again.rows] == [replace(row, seconds=0.0) for row in made.rows]


def test_networks_and_losses_of_ones_own_are_not_kept(tmp_path: Path) -> None:
    def own(config: ModelConfig, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes) if config.name == "" else nn.Linear(3 * 64**2, 10))

    cache = PlanCache(tmp_path)
    assert not Predictor(card(GiB), make_model=own, cache=cache).predict(first(*SMALL)).reason
    with_loss = Predictor(card(GiB), make_loss=lambda *_: nn.CrossEntropyLoss(), cache=cache)
    assert not with_loss.predict(first(*SMALL)).reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_key_tells_apart_what_matters() -> None:
    predictor = Predictor(card(GiB))
    base = predictor.key(first(*SMALL))
    changes = (
        "trainer.batch_size=4", "trainer.micro_batch_size=2", "trainer.eval_batch_size=3", "data.image_size=96",
        "trainer.precision=fp16", "trainer.recompute=blocks", "trainer.ema_decay=0.9",
        "trainer.clip_grad=1.0", "trainer.label_smoothing=0.1", "model.name=resnet18", "model.num_classes=7",
        "data.cache=disk", "+model.kwargs.drop_rate=0.2", "optimizer=sgd", "+optimizer.kwargs.foreach=true",
    )  # fmt: skip
    keys = [predictor.key(first(*SMALL, change)) for change in changes]
    keys += [Predictor(replace(predictor.spec, capability=(9, 0))).key(first(*SMALL))]
    keys += [Predictor(replace(predictor.spec, cuda=False)).key(first(*SMALL))]
    texts = [json.dumps(key, sort_keys=True) for key in (base, *keys)]
    assert len(set(texts)) == len(texts)
    assert predictor.key(first(*SMALL, "optimizer.lr=0.5", "seed=3")) == base
    assert {"torch", "timm", "torchvision", "adaptive_trainer"} <= base["versions"].keys()


@pytest.mark.long
def test_stored_images_take_what_their_buffers_hold() -> None:
    """The whole batch as floats instead of a part, and the next one as bytes."""
    cached = (*SMALL, "data.cache=ram")
    for micro in (8, 2):
        how = f"trainer.micro_batch_size={micro}"
        without, beside = (Predictor(card(GiB)).predict(first(*keys, how)) for keys in (SMALL, cached))
        buffers = DeviceBatch(8, 64, 73, torch.device("cpu"))
        held = [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
        before = micro * (3 * 64 * 64 * 4 + 8)
        assert without.live_bytes is not None
        assert beside.live_bytes is not None
        assert beside.live_bytes - without.live_bytes == sum(t.nbytes for t in held) - before


def test_stored_images_of_a_rung_are_those_of_the_request() -> None:
    rung = ("data.cache=disk", "data.image_size=32")
    own, request = Predictor(card(GiB)), Predictor(card(GiB), stored_size=73)
    assert own.key(first(*SMALL, *rung))["recipe"]["stored_size"] == 37
    assert request.key(first(*SMALL, *rung))["recipe"]["stored_size"] == 73
    found = [predictor.predict(first(*SMALL, *rung)).live_bytes for predictor in (own, request)]
    assert None not in found
    assert found[1] - found[0] == 8 * 3 * (73**2 - 37**2)  # type: ignore[operator]
    assert Predictor(replace(own.spec, cuda=False)).key(first(*SMALL, *rung))["recipe"]["stored_size"] == 0
    sizes = [first("data.cache=ram", f"data.image_size={size}") for size in (64, 224)]
    assert (stored_size(sizes), stored_size([first()])) == (256, 0)


def test_a_plan_counts_what_is_stored_for_the_request(tmp_path: Path) -> None:
    ladder = "ladder.rungs=[{name: small, overrides: ['data.image_size=32']}]"
    made = [run_plan(settings(*SMALL, *more, ladder, "card=rtx2060"), tmp_path) for more in ([], ["data.cache=disk"])]
    for row, other in zip(made[0].rows, made[1].rows, strict=True):
        assert other.live_bytes is not None
        assert row.live_bytes is not None
        assert 0 < other.live_bytes - row.live_bytes - 8 * 3 * 73**2 < 1024, "windows and labels"


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "new" / "folder")
    assert cache.get(Prediction, KEY) is None
    cache.keep(KEY, PREDICTION)
    assert cache.get(Prediction, KEY) == PREDICTION
    assert cache.get(Prediction, {**KEY, "batch": 9}) is None
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".json"]


def test_failures_are_not_kept(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.keep(KEY, Prediction(None, None, None, None, 0.1, "no memory"))
    assert cache.get(Prediction, KEY) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"key": {}, "value": {}}', b'{"key": "KEY", "value": {}}',
        b'{"key": "KEY", "value": {"live_bytes": 1}}', b'{"key": "KEY", "value": []}',
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_absent_and_is_mended(tmp_path: Path, damage: bytes) -> None:
    cache = PlanCache(tmp_path)
    cache.keep(KEY, PREDICTION)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage.replace(b'"KEY"', json.dumps(KEY).encode()))
    assert cache.get(Prediction, KEY) is None
    cache.keep(KEY, PREDICTION)
    assert cache.get(Prediction, KEY) == PREDICTION


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for cache in (PlanCache(tmp_path / "file" / "folder"), PlanCache(None)):
        cache.keep(KEY, PREDICTION)
        assert cache.get(Prediction, KEY) is None


def write_often(folder: Path, number: int) -> None:
    cache = PlanCache(folder)
    for turn in range(200):
        cache.keep(KEY, replace(PREDICTION, live_bytes=1000 * number + turn))


def test_two_processes_at_once(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.keep(KEY, PREDICTION)
    writers = [multiprocessing.Process(target=write_often, args=(tmp_path, number)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        found = cache.get(Prediction, KEY)
        assert found is not None, "half an entry was read"
        seen.add(found.live_bytes)
    assert len(seen) > 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_measurements_of_a_card(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    mine = {**KEY, "card": "H200"}
    assert cache.get(Measurement, mine) is None
    cache.keep(mine, Measurement().failed(100).fitted(200, 150, 180))
    assert cache.get(Measurement, mine) == Measurement(200, 100, 150, 180)
    assert cache.get(Measurement, {**KEY, "card": "T4"}) is None
    for seen in (5000, 790, 810):  # another process was there as well the first time
        cache.keep_context("H200", seen * MiB)
    assert cache.context_bytes("H200") == 790 * MiB
    assert cache.context_bytes("T4") is None


def test_what_measurements_say() -> None:
    assert Measurement().verdict(100) == "unknown"
    known = Measurement().failed(100).fitted(200, 150, 180)
    rooms = {99: "hopeless", 100: "hopeless", 101: "unknown", 199: "unknown", 200: "fits"}
    assert {room: known.verdict(room) for room in rooms} == rooms
    assert known.fitted(90, 80, 85) == Measurement(90, None, 80, 85)
    assert known.failed(300) == Measurement(None, 300)
    assert known.failed(50) == known
    assert known.fitted(250, 150, 180) == known


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_folder() == tmp_path / "cache"
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", "")
    assert default_folder() is None
    monkeypatch.delenv("ADAPTIVE_TRAINER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME" if os.name != "nt" else "LOCALAPPDATA", str(tmp_path))
    assert default_folder() == tmp_path / "adaptive_trainer"


def test_versions_are_found_once() -> None:
    assert versions() is versions()
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__


TINY = [
    ("test_resnet", 8, 64, []),
    ("test_vit3", 2, 160, ["trainer.micro_batch_size=1"]),
    ("test_convnext3", 16, 32, ["trainer.precision=fp16"]),
]
MORE_TINY = [
    (name, batch, size, more)
    for name in ("test_resnet", "test_byobnet", "test_efficientnet", "test_nfnet", "resnet10t", "mnasnet_small")
    for batch, size, more in (
        (8, 64, ["optimizer=sgd"]), (3, 32, ["trainer.ema_decay=0.9"]), (16, 96, ["trainer.micro_batch_size=4"]),
    )
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("name", "batch", "size", "more"), TINY)
def test_a_tiny_network_trains_where_it_is_planned_to_fit(
    name: str, batch: int, size: int, more: list[str], tmp_path: Path
) -> None:
    check_tiny(name, batch, size, more, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "size", "more"), MORE_TINY)
def test_more_tiny_networks(name: str, batch: int, size: int, more: list[str], tmp_path: Path) -> None:
    check_tiny(name, batch, size, more, tmp_path)


def check_tiny(name: str, batch: int, size: int, more: list[str], folder: Path) -> None:
    """At the smallest limit that is planned to fit it trains, and at the largest hopeless one it does not."""
    overrides = [
        "data=fakedata", f"data.train.size={4 * batch}", f"data.val.size={batch}", f"data.image_size={size}",
        f"trainer.batch_size={batch}", "data.num_workers=0", f"model.name={name}", "trainer.epochs=1", "device=cpu",
        "ladder=none", *more,
    ]  # fmt: skip
    (row,) = run_plan(compose_config([*overrides, "memory.limit=64MiB"]), folder).rows
    least = row.min_capacity_bytes or 0
    found = Prediction(0, 0, 0, least, 0.0)
    answers = {limit: verdict(found, limit * MiB) for limit in range(2, 3 * least // MiB + 8)}
    fits = min(limit for limit, answer in answers.items() if answer == "fits")
    hopeless = max((limit for limit, answer in answers.items() if answer == "hopeless"), default=0)
    trained = Trainer(compose_config([*overrides, f"memory.limit={fits}MiB"]), output_dir=folder / "fits").fit()
    assert trained.rung == "requested"
    if hopeless:
        cfg = compose_config([*overrides, f"memory.limit={hopeless}MiB"])
        with pytest.raises(LadderExhausted):
            Trainer(cfg, output_dir=folder / "hopeless").fit()
