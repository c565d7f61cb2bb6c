"""What the descent skips, and on what grounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.errors import LadderExhausted
from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.planning.judge import Judge

MiB = 2**20
SMALL = ["model.name=mobilenetv3_small_050", "data.image_size=64", "trainer.batch_size=16", "device=cpu"]
DATA = ["data=fakedata", "data.train.size=16", "data.val.size=8", "data.num_workers=0"]


def settings(*overrides: str) -> Config:
    return resolve(compose_config([*SMALL, *overrides, "ladder=none"]))[0].settings


def judge(limit: int) -> Iterator[Judge]:
    with limited(torch.device("cpu"), f"{limit}b") as capacity:
        yield Judge(capacity, 10)


def need_of(config: Config) -> int:
    [need] = [each.assess(config)[1] for each in judge(1024 * MiB)]
    assert need is not None
    return need


def failed(config: Config, predicted: int | None) -> Attempt:
    return Attempt("a rung", Outcome.OOM, "forward", "out of memory", predicted_bytes=predicted)


@pytest.mark.parametrize(("share", "skipped"), [(0.88, True), (0.92, False), (1.1, False)])
def test_only_the_hopeless_is_skipped(share: float, skipped: bool) -> None:
    config = settings("trainer.batch_size=64", "data.image_size=192")  # a share of it is more than a segment
    need = need_of(config)
    for each in judge(int(need * share)):
        reason, known = each.assess(config)
        assert known == need
        assert bool(reason) == skipped
        assert ("it is predicted to need" in reason) == skipped


def test_no_trace_where_the_weights_alone_are_too_large() -> None:
    seen: list[nn.Module] = []

    def make(config: ModelConfig, classes: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 128), nn.Linear(128, classes))  # 6 MiB
        model.register_forward_pre_hook(lambda *_: seen.append(model))
        return model

    for limit, reason in ((2 * MiB, "its weights alone take 6150 KiB, and there are 2048 KiB"), (64 * MiB, "")):
        with limited(torch.device("cpu"), f"{limit}b") as capacity:
            found, need = Judge(capacity, 10, make).assess(settings())
        assert (found, bool(seen)) == (reason, not reason)
        assert need is not None
        assert need > 6 * MiB


def test_a_network_that_cannot_be_counted_is_traced() -> None:
    def make(config: ModelConfig, classes: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 128))
        assert model.state_dict()["1.bias"].tolist()[0] < 1  # which a tensor on meta does not say
        return model

    with limited(torch.device("cpu"), "2MiB") as capacity:
        assert "it is predicted to need" in Judge(capacity, 10, make).assess(settings())[0]


def test_a_failure_that_was_foretold_is_believed_for_its_model() -> None:
    config = settings("data.image_size=128")
    other = settings("data.image_size=106", "model.name=mobilenetv3_small_075")
    need, other_need = need_of(config), need_of(other)
    room = min(need, other_need) - 2 * MiB
    for each in judge(room):
        assert (each.assess(config)[0], each.assess(other)[0]) == ("", "")
        each.learn(config, failed(config, max(need, other_need) + 2 * MiB))
        assert "was foretold" in each.assess(config)[0]
        assert each.assess(other)[0] == ""
        each.begin()
        assert each.assess(config)[0] == ""


def test_what_needs_no_less_than_a_failed_rung_is_not_tried() -> None:
    small, large = settings(), settings("data.image_size=96")
    for each in judge(1024 * MiB):
        each.learn(small, failed(small, need_of(small)))
        assert "no less than a rung that failed" in each.assess(large)[0]
        assert "no less than a rung that failed" in each.assess(small)[0]


def test_without_a_limit_nothing_is_skipped() -> None:
    with limited(torch.device("cpu"), "none") as capacity:
        assert Judge(capacity, 10).assess(settings("trainer.batch_size=4096")) == ("", None)


def test_the_last_rung_is_tried_whatever_is_predicted(tmp_path: Path) -> None:
    config = compose_config([*SMALL, *DATA, "memory.limit=3MiB", "ladder=none"])
    with pytest.raises(LadderExhausted, match="no rung of the ladder fits"):
        Trainer(config, output_dir=tmp_path).fit()
    assert '"outcome": "oom"' in (tmp_path / "attempts.jsonl").read_text()


def test_a_proof_is_remembered_until_it_turns_out_not_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a CUDA card has: a memory of dry runs, and room that loading kernels takes from one."""
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * MiB, 100 * MiB))
    room = 60 * MiB
    monkeypatch.setattr(Capacity, "room", lambda self: room)
    config, other = settings(), settings("data.image_size=96")
    for each in judge(64 * MiB):
        each._is_cuda = True
        assert each.earlier_dry_run(config) is None
        room = 50 * MiB
        each.learn(config, Attempt("a rung", Outcome.FITS, peak_allocated_bytes=30 * MiB, peak_reserved_bytes=40 * MiB))
        assert each.earlier_dry_run(config) is None, "proven with 60 MiB free at first"
        room = 60 * MiB
        known = each.earlier_dry_run(config)
        assert known is not None
        assert (known.peak_allocated, known.peak_reserved) == (30 * MiB, 40 * MiB)
        assert each.earlier_dry_run(other) is None
        each._keep(config, known.failed(20 * MiB))
        each.forget(config)
        assert each.earlier_dry_run(config) is None
        assert each._measurement(config).oom_in == 20 * MiB
