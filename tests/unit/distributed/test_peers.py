"""One rank alone; two of them are in tests/integration/test_ranks.py."""

from __future__ import annotations

import pytest
import torch

from adaptive_trainer.distributed.peers import Peers, Site, Status, all_are_well, joined, peers, together
from adaptive_trainer.errors import OutOfMemory, PeerLost
from adaptive_trainer.utils import launch

CPU = torch.device("cpu")


def test_one_rank_agrees_with_itself() -> None:
    alone = Peers()
    assert alone.vote(Site.UPDATE, Status.FAILED, 3, 4) is Status.FAILED
    assert alone.numbers == [[3, 4]]
    assert (alone.gathered("a"), alone.decided(lambda: 5), alone.is_first) == (["a"], 5, True)
    with joined(CPU) as here:
        assert here is peers()
        assert here.size == 1
    assert all_are_well(7) == [7]
    assert together(lambda: 1, CPU) == 1
    with pytest.raises(OutOfMemory, match="of this rank"):
        together(lambda: fail("of this rank"), CPU)


def fail(text: str) -> int:
    raise OutOfMemory(text, phase="forward")


def test_ranks_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "no port")):
        monkeypatch.setenv(name, value)
    assert (launch.world_size(), launch.rank(), launch.local_rank(), launch.restarts()) == (2, 1, 0, 0)
    with pytest.raises((PeerLost, ValueError)), joined(CPU):
        pass
    monkeypatch.delenv("RANK")
    assert (launch.world_size(), launch.rank()) == (1, 0)
