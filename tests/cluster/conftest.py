from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.nodes import Cluster


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: a head without CPUs and two of one CPU each. A test that takes one brings another."""
    made = Cluster(tmp_path_factory.mktemp("home"))
    try:
        made.add_node()
        made.add_node()
        yield made
    finally:
        made.close()
