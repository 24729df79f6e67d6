"""The committed mixes are configurations that run, and hold what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from qwen_ray.config import RunConfig, build_config
from qwen_ray.data.dataset import make_mixture
from qwen_ray.data.mixture import Mixture
from qwen_ray.evaluation.suites import names

ROOT = Path(__file__).parents[2]
MIXES = sorted((ROOT / "configs" / "mixes").glob("*.yaml"))
TARGETS = ("biology", "history", "security")


@pytest.mark.parametrize("path", MIXES, ids=lambda p: p.stem)
def test_a_mix_loads_and_is_headed_by_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# qwen-ray train --config configs/mixes/{path.name} --out runs/{path.stem}"
    config = build_config(path)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert {Path(file).stem for file in config.data.train} == set(config.data.weights)
    assert set(config.data.max_epochs) <= set(config.data.weights)
    assert set(config.evaluate.suites) <= set(names())


def guide(**records: int) -> tuple[Mixture, int]:
    """The guide's mix over so many records of each domain, and the draws of its run."""
    config = build_config(ROOT / "configs" / "mixes" / "guide.yaml")
    sizes = {d: [1] * records.get(d, 500) for d in config.data.weights}
    mixture = make_mixture(config.data, sizes, seed=0)
    return mixture, mixture.plan_passes(config.optim.epochs)


def test_the_guides_mix_is_80_10_10() -> None:
    mixture, n = guide()
    drawn = Counter(mixture.draw()[0] for _ in range(n))
    assert sum(drawn[d] for d in TARGETS) == pytest.approx(0.8 * n, abs=3)
    assert drawn["mathematics"] == pytest.approx(0.1 * n, abs=2)
    assert drawn["general"] == pytest.approx(0.1 * n, abs=2)
    assert {drawn[d] for d in TARGETS} == {1500}  # three epochs


@pytest.mark.parametrize(("records", "lasts"), [(140, False), (142, True)])
def test_how_large_a_replay_set_must_be(records: int, lasts: bool) -> None:
    """What the file says: at least 0.28 of the records of the smallest target."""
    mixture, n = guide(general=records)
    domains = [mixture.draw()[0] for _ in range(n)]
    assert ("general" in domains[-20:]) is lasts
    assert domains.count("general") <= 4 * records
