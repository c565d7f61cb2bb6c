"""What one rung trains with, and what of it the next one goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from adaptive_trainer.config.overrides import compose_config
from adaptive_trainer.errors import ModelError
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.training.session import Parts, Session, enter, refuse_collectives, settle
from tests.support.runs import CPU


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(net: nn.Module) -> nn.Module:
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    return net  # in place


def sharded_as_before(net: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(net, device_id=CPU, sharding_strategy=ShardingStrategy.NO_SHARD)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own: the older way to shard goes
@pytest.mark.parametrize(
    ("wrap", "name", "remedy"),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, "SyncBatchNorm", "Use BatchNorm"),
        (nn.parallel.DistributedDataParallel, "DistributedDataParallel", "Give the network that is in it"),
        (sharded, "FSDPModule", "Give the network before it is sharded"),
        (sharded_as_before, "FullyShardedDataParallel", "Give the network before it is sharded"),
    ],
)
@pytest.mark.usefixtures("group")
def test_networks_whose_passes_wait_for_other_ranks_are_refused(
    wrap: Callable[[nn.Module], nn.Module], name: str, remedy: str
) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    refuse_collectives(net)
    with pytest.raises(ModelError, match=f"^the network has {name}, whose passes wait .* {remedy}"):
        refuse_collectives(wrap(net))


def parts(capacity: Capacity) -> Parts:
    return Parts(
        lambda config, classes: nn.Linear(4, classes), lambda *_: nn.CrossEntropyLoss(), "", 3, 64, CPU, capacity
    )


def test_corrected_weight_decay_follows_the_base_rate_of_the_rung(capacity: Capacity) -> None:
    """timm relates it to the largest learning rate, which it takes for the one it was made with."""
    scaled = ["optimizer.name=adamc", "optimizer.lr=0.04", "trainer.batch_size=32", "trainer.lr_policy=linear"]
    ladder = resolve(compose_config([*scaled, "ladder.rungs=[{name: less, overrides: ['trainer.batch_size=8']}]"]))
    above = enter(ladder[0].settings, parts(capacity))
    below = enter(ladder[1].settings, parts(capacity), above)
    assert below.state.optimizer is above.state.optimizer
    weight = next(p for p in below.state.model.parameters() if p.ndim > 1)
    before = weight.detach().clone()
    for parameter in below.state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    below.schedule.apply(0)
    below.state.optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.01 * 0.05))


def test_samples_are_counted_beyond_what_single_precision_holds(capacity: Capacity) -> None:
    session = enter(resolve(compose_config(["trainer.batch_size=3"]))[0].settings, parts(capacity))
    session.state.meters["seen"].fill_(2**24)
    session.update.run(torch.rand(3, 4), torch.arange(3), samples=3)
    assert session.state.meters["seen"] == 2**24 + 3


BASE = ["trainer.batch_size=8", "trainer.ema_decay=0.9", "optimizer.weight_decay=0.1", "optimizer.lr=0.01"]
ADAM = ["optimizer.name=adamw", *BASE]
SGD = ["optimizer.name=momentum", *BASE]
STATE_IS_KEPT = {
    "average's decay": (ADAM, "trainer.ema_decay=0.5"),
    "weight decay": (ADAM, "optimizer.weight_decay=0.2"),
    "betas": (ADAM, "+optimizer.kwargs.betas=[0.8,0.99]"),
    "eps": (ADAM, "+optimizer.kwargs.eps=1e-5"),
    "momentum": (SGD, "optimizer.momentum=0.8"),
    "clipping": (ADAM, "trainer.clip_grad=1"),
    "schedule": (ADAM, "schedule.name=constant"),
    "precision": (ADAM, "trainer.precision=bf16"),
    "recomputing": (ADAM, "trainer.recompute=blocks"),
    "betas of a foreign one": (["optimizer.name=lion", *BASE], "+optimizer.kwargs.betas=[0.8,0.9]"),
}
STATE_IS_NEW = {
    "another kind": (ADAM, "optimizer.name=lion"),
    "more state": (ADAM, "+optimizer.kwargs.amsgrad=true"),
    "other groups": (ADAM, "optimizer.weight_decay=0"),
    "no momentum": (SGD, "optimizer.momentum=0"),
    "sizes that state has": (["optimizer.name=adafactorbv", *BASE], "+optimizer.kwargs.min_dim_size_to_factor=64"),
}


def stepped_down(settings: list[str], override: str, capacity: Capacity) -> tuple[Session, Session]:
    """A session that has trained, and the one of a rung that changes one setting."""
    rung = override.lstrip("+")
    rungs = f"ladder.rungs=[{{name: less, overrides: ['{override}', 'trainer.batch_size=4']}}]"
    ladder = resolve(compose_config([*settings, rungs]))
    assert ladder[1].settings != ladder[0].settings, rung
    above = enter(ladder[0].settings, parts(capacity))
    for _ in range(3):
        above.update.run(torch.rand(3, 4), torch.arange(3), samples=3)
    return above, enter(ladder[1].settings, parts(capacity), above)


def state_of(session: Session) -> list[Tensor]:
    values = [v for each in session.state.optimizer.state.values() for v in each.values() if isinstance(v, Tensor)]
    return [value.clone() for value in values]


@pytest.mark.parametrize(("settings", "override"), STATE_IS_KEPT.values(), ids=STATE_IS_KEPT)
def test_what_a_rung_leaves_as_it_is_is_carried_on(settings: list[str], override: str, capacity: Capacity) -> None:
    above, below = stepped_down(settings, override, capacity)
    assert above.state.ema is not None
    average = [value.clone() for value in above.state.ema.module.state_dict().values()]
    weights = list(above.state.model.state_dict().values())
    assert not all(map(torch.equal, average, weights)), "an average that began anew would be seen"
    assert isinstance(below.state.ema, ModelEmaV3)
    assert all(map(torch.equal, below.state.ema.module.state_dict().values(), average))
    assert state_of(above)
    assert all(map(torch.equal, state_of(below), state_of(above)))
    asked = below.config
    assert below.state.ema.decay == asked.trainer.ema_decay
    decays = {group["weight_decay"] for group in below.state.optimizer.param_groups}
    assert decays == {0.0, asked.optimizer.weight_decay}
    for group in below.state.optimizer.param_groups:
        if betas := asked.optimizer.kwargs.get("betas"):
            assert list(group["betas"]) == betas
        assert group.get("eps", 1e-5) == asked.optimizer.kwargs.get("eps", group.get("eps", 1e-5))
        assert group.get("momentum", asked.optimizer.momentum) == asked.optimizer.momentum


@pytest.mark.parametrize(("settings", "override"), STATE_IS_NEW.values(), ids=STATE_IS_NEW)
def test_state_of_another_kind_is_not_carried_on(settings: list[str], override: str, capacity: Capacity) -> None:
    above, below = stepped_down(settings, override, capacity)
    assert below.state.optimizer is not above.state.optimizer
    assert all(bool((value == 0).all()) for value in state_of(below))
    below.update.run(torch.rand(3, 4), torch.arange(3), samples=3)


@pytest.mark.parametrize(("settings", "override"), STATE_IS_KEPT.values(), ids=STATE_IS_KEPT)
def test_going_back_from_a_rung_trains_as_if_it_had_never_been_tried(
    settings: list[str], override: str, capacity: Capacity
) -> None:
    ends = []
    for is_tried in (False, True):
        if is_tried:
            above, _ = stepped_down(settings, override, capacity)
            settle(above.config, above.state)
        else:
            ladder = resolve(compose_config(settings))
            above = enter(ladder[0].settings, parts(capacity))
            for _ in range(3):
                above.update.run(torch.rand(3, 4), torch.arange(3), samples=3)
        above.update.run(torch.ones(3, 4), torch.arange(3), samples=3)
        assert above.state.ema is not None
        ends.append([*above.state.ema.module.state_dict().values(), *state_of(above)])
    assert all(map(torch.equal, *ends))
