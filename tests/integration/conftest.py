from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.forking import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()
