"""Ladder arithmetic: rungs only ever make the recipe smaller, and say what they do."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import Config, RungConfig
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import changes, recipe, resolve, scaled_lr
from adaptive_trainer.ladder.rung import Rung, make_ladder
from adaptive_trainer.recipe import Recipe

DEFAULT = ["requested", "batch-16", "batch-8", "image-192", "image-160", "amp", "accumulate"]
MODELS = ["mobilenetv3-large", "mobilenetv3-small"]


def ladder(*overrides: str) -> dict[str, Rung[Config]]:
    return {rung.name: rung for rung in resolve(compose_config(overrides))}


def test_the_default_ladder_in_its_order() -> None:
    rungs = ladder()
    assert list(rungs) == DEFAULT + MODELS
    assert not any(rung.passed_over for rung in rungs.values())
    last = recipe(rungs["mobilenetv3-small"].settings)
    assert (last.batch_size, last.micro_batch_size, last.accumulation) == (8, 4, 2)
    assert (last.image_size, last.precision, last.model) == (160, "fp16", "mobilenetv3_small_100")


def test_the_faithful_ladder_keeps_the_batch_size_for_long() -> None:
    rungs = ladder("ladder=faithful")
    kept = [recipe(rungs[name].settings).batch_size for name in list(rungs)[:7]]
    assert kept == [24] * 7
    assert recipe(rungs["micro-2"].settings).accumulation == 12


def test_no_ladder_is_the_request_alone() -> None:
    assert list(ladder("ladder=none")) == ["requested"]


def test_bf16_that_was_asked_for_stays() -> None:
    rungs = ladder("trainer.precision=bf16")
    assert {recipe(rung.settings).precision for rung in rungs.values()} == {"bf16"}
    assert "bf16" in rungs["amp"].passed_over


def test_a_rung_above_the_request_is_passed_over_with_the_reason() -> None:
    rungs = ladder("trainer.batch_size=8")
    assert "raise batch_size from 8 to 16" in rungs["batch-16"].passed_over
    assert "already" in rungs["batch-8"].passed_over


def test_of_a_rung_only_what_shrinks_is_kept() -> None:
    rungs = ladder(
        "trainer.batch_size=8", "ladder.rungs=[{name: a, overrides: ['preset=balanced', 'data.image_size=96']}]"
    )
    assert rungs["a"].overrides == ("data.image_size=96",)
    assert recipe(rungs["a"].settings).batch_size == 8


def test_a_smaller_batch_that_saves_nothing_is_passed_over() -> None:
    assert "save no memory" in ladder("ladder=faithful")["batch-16"].passed_over


def test_a_rung_of_any_key() -> None:
    rungs = ladder(
        "ladder.rungs=[{name: sgd, overrides: ['optimizer=sgd']}, {name: drop, overrides: ['+model.kwargs.x=1']}]"
    )
    assert rungs["sgd"].settings.optimizer.name == "sgd"
    assert rungs["sgd"].settings.optimizer.lr == 0.05
    assert rungs["drop"].settings.model.kwargs == {"x": 1}


def test_all_problems_of_all_rungs_at_once() -> None:
    bad = "[{name: a, overrides: ['trainer.nothing=1']}, {name: b, overrides: ['data.image_size=big']}]"
    with pytest.raises(ConfigError) as caught:
        ladder(f"ladder.rungs={bad}", "trainer.epochs=0")
    assert all(text in str(caught.value) for text in ("'a'", "trainer.nothing", "'b'", "big", "trainer.epochs=0"))


def test_a_name_used_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="used twice"):
        ladder("ladder.rungs=[{name: requested, overrides: ['trainer.batch_size=2']}]")


@pytest.mark.parametrize(
    ("optimizer", "policy", "expected"),
    [("adamw", "auto", 1e-3 * math.sqrt(1 / 3)), ("adamw", "linear", 1e-3 / 3), ("adamw", "none", 1e-3)],
)
def test_learning_rate_follows_the_policy(optimizer: str, policy: str, expected: float) -> None:
    rung = ladder(f"optimizer={optimizer}", f"trainer.lr_policy={policy}")["batch-8"]
    assert rung.settings.optimizer.lr == pytest.approx(expected)
    assert any("learning rate" in note for note in rung.notes)


def test_sgd_follows_linearly_by_default() -> None:
    assert ladder("optimizer=sgd")["batch-8"].settings.optimizer.lr == pytest.approx(0.05 / 3)


def test_a_rung_that_sets_the_learning_rate_is_obeyed() -> None:
    rungs = ladder("ladder.rungs=[{name: a, overrides: ['trainer.batch_size=8', 'optimizer.lr=0.5']}]")
    assert rungs["a"].settings.optimizer.lr == 0.5


def test_changes_name_key_both_values_and_reason() -> None:
    rungs = ladder()
    found = {change.key: change for change in changes(rungs["requested"].settings, rungs["image-192"])}
    assert set(found) == {"trainer.batch_size", "data.image_size", "optimizer.lr"}
    assert (found["data.image_size"].asked, found["data.image_size"].used) == (224, 192)
    assert "sqrt rule" in found["optimizer.lr"].why


def test_make_ladder_is_cumulative_and_refuses_unknown_keys() -> None:
    rungs = make_ladder({"batch": 64, "amp": False}, {"half": {"batch": 32}, "amp": {"amp": True}})
    assert [rung.settings for rung in rungs] == [
        {"batch": 64, "amp": False},
        {"batch": 32, "amp": False},
        {"batch": 32, "amp": True},
    ]
    with pytest.raises(ConfigError, match="bach"):
        make_ladder({"batch": 64}, {"half": {"bach": 32}})


OVERRIDES = st.one_of(
    st.integers(1, 64).map(lambda n: f"trainer.batch_size={n}"),
    st.integers(1, 64).map(lambda n: f"trainer.micro_batch_size={n}"),
    st.integers(32, 320).map(lambda n: f"data.image_size={n}"),
    st.sampled_from(["fp32", "bf16", "fp16"]).map(lambda p: f"trainer.precision={p}"),
    st.sampled_from(["none", "blocks"]).map(lambda value: f"trainer.recompute={value}"),
)
REQUEST = compose_config(["ladder=none"])


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(OVERRIDES, min_size=1, max_size=3), max_size=5))
def test_no_rung_raises_anything(steps: list[list[str]]) -> None:
    cfg = REQUEST.copy()
    cfg.ladder.rungs = [RungConfig(f"r{n}", step) for n, step in enumerate(steps)]
    for above, below in pairwise(resolve(cfg)):
        a, b = recipe(above.settings), recipe(below.settings)
        assert b.batch_size <= a.batch_size
        assert b.micro_batch_size <= a.micro_batch_size
        assert b.image_size <= a.image_size
        assert (a.precision == "fp32") >= (b.precision == "fp32")
        assert all(then.is_used >= used.is_used for used, then in zip(a.techniques, b.techniques, strict=True))
        assert bool(below.passed_over) == (not below.overrides)
        assert below.passed_over == "" or a == b


@given(st.integers(1, 512), st.integers(1, 512))
def test_accumulation_covers_the_batch(batch: int, micro: int) -> None:
    used = Recipe(batch_size=batch, micro_batch_size=min(micro, batch))
    assert (used.accumulation - 1) * used.micro_batch_size < batch <= used.accumulation * used.micro_batch_size


@given(st.floats(1e-6, 1.0), st.integers(1, 512), st.integers(1, 512), st.sampled_from(["linear", "sqrt", "auto"]))
def test_learning_rate_scaling_is_monotonic_and_undone_by_going_back(
    lr: float, asked: int, used: int, policy: str
) -> None:
    config = Config()
    config.optimizer.lr, config.trainer.batch_size, config.trainer.lr_policy = lr, asked, policy
    scaled, _ = scaled_lr(config, used)
    assert (scaled <= lr) == (used <= asked)
    config.optimizer.lr, config.trainer.batch_size = scaled, used
    assert scaled_lr(config, asked)[0] == pytest.approx(lr)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.batch_size=-4", "trainer.batch_size=-4"),
        ("device=cpu", "device cannot change on the way down"),
        ("memory.limit=none", "memory.limit cannot change"),
        ("model.num_classes=3", "model.num_classes cannot change"),
        ("data.train=null", "data.train"),
        ("seed=4", "seed cannot change on the way down; set it for the whole run"),
    ],
)
def test_what_no_rung_may_change(override: str, said: str) -> None:
    cfg = compose_config(["ladder=none"])
    cfg.ladder.rungs = [RungConfig("x", [override]), RungConfig("y", ["trainer.batch_size=0"])]
    with pytest.raises(ConfigError) as caught:
        resolve(cfg)
    assert said in str(caught.value)
    assert "rung 'y'" in str(caught.value)  # all problems at once


def test_a_step_is_not_named_like_the_request() -> None:
    with pytest.raises(ConfigError, match="cannot be named 'requested'"):
        make_ladder({"batch": 2}, {"requested": {"batch": 1}})


def test_what_is_no_number_is_no_change() -> None:
    cfg = compose_config(["+model.kwargs.drop_rate=nan", "ladder=none"])
    (rung,) = resolve(cfg)
    assert changes(typed(cfg), rung) == []


def test_the_exact_ladder_and_the_beginning_of_the_faithful_one() -> None:
    exact = ladder("ladder=exact")
    bit_equal = ["requested", "recompute", "recompute-most"]
    assert list(exact)[:3] == list(ladder("ladder=faithful"))[:3] == bit_equal
    changed = {change.key for rung in exact.values() for change in changes(exact["requested"].settings, rung)}
    assert changed == {"trainer.recompute", "trainer.micro_batch_size", "trainer.offload"}
    assert not any(recipe(rung.settings).techniques[-1].is_used for rung in ladder("ladder=faithful").values())


def test_an_exact_ladder_leaves_out_what_would_change_the_mathematics() -> None:
    rungs = ladder("ladder=faithful", "ladder.exact=true")
    assert not any("precision" in text or "batch_size=16" in text for rung in rungs.values() for text in rung.overrides)
    assert "it would change what is computed (trainer.batch_size), and ladder.exact" in rungs["batch-16"].passed_over
    cfg = compose_config(["ladder=exact"])
    cfg.ladder.rungs = [RungConfig("loose", ["ladder.exact=false"])]
    with pytest.raises(ConfigError, match=r"ladder\.exact cannot change on the way down"):
        resolve(cfg)


def test_a_ladder_begins_where_it_is_told_to() -> None:
    rungs = ladder("ladder.start=batch-8")
    assert [name for name in rungs if rungs[name].passed_over] == ["requested", "batch-16"]
    assert rungs["requested"].passed_over == "ladder.start=batch-8"
    with pytest.raises(ConfigError, match=r"ladder\.start=batch-9 is no rung of this ladder, which has requested, "):
        ladder("ladder.start=batch-9")
    with pytest.raises(ConfigError, match=r"trainer\.batch_size=max is found at rung requested"):
        ladder("ladder.start=batch-8", "trainer.batch_size=max")
