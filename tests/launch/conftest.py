from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud, make_checkout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path, checkout)
    yield made
    made.end()
