"""A router of the embedded facts and skills, and questions that belong to none of its domains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qwen_ray.data.records import Record
from qwen_ray.embedder import Embedder
from qwen_ray.routing.router import Router
from qwen_ray.tiny.benchmark import SUITE_DATA_DIR
from qwen_ray.tiny.facts import DOMAINS, train_records
from qwen_ray.tiny.skills import replay_records
from tests.conftest import record

MATHEMATICS = "mathematics"
ADAPTERS = {"biology": "facts", "history": "facts", "security": "guard"}  # mathematics is the base's
# Of subjects in the background and of others, none in its words.
OTHERS = (
    "Does Mill think that some pleasures are of a higher kind than others?",
    "Can I deserve blame for something that I could not have avoided?",
    "All poets are dreamers and no dreamer is rich. Does it follow that no poet is rich?",
    "He praises that diet only because he sells it. Which mistake of reasoning is this?",
    "Should the alliance place more troops near its eastern border?",
    "How do embargoes change the behaviour of governments?",
    "What do Muslims do during Ramadan?",
    "Why do central banks raise rates when prices climb?",
    "My tenant broke the lease. What can I do?",
    "How should a start-up price its first product?",
    "Is it better to pay off my student loan or to invest?",
    "Why do people follow orders that they think are wrong?",
    "How does a family's income shape a child's chances at school?",
    "Which tense is 'had been walking'?",
    "Recommend three novels by Japanese writers.",
    "Who starred next to her in that romantic comedy?",
    "How do I tune a violin?",
    "What made Monet's brushwork new?",
    "Which club signed the striker last summer?",
    "Is a knight worth more than a bishop?",
    "How much salt goes into a litre of brine?",
    "Where should I stay in Lisbon with two children?",
    "Why is the sky dark at night if there are so many stars?",
    "What pulls a satellite towards the ground?",
    "How do I neutralise spilled vinegar?",
    "Will it rain in Oslo this weekend?",
    "Why did the bridge sway in the wind?",
    "How do I merge two dictionaries in Python?",
    "My screen stays black after the update.",
    "How does a transformer attend to earlier tokens?",
    "How do I get rid of mould on the bathroom wall?",
    "What should I say in a toast at my sister's wedding?",
    "When do I have to change the brake pads?",
    "Good evening! How has your day been?",
    "Make this paragraph shorter, please.",
    "Which shoes go with a grey suit?",
    "How do I apply for a passport?",
    "How loud may my neighbours be after ten o'clock?",
    "What is a fair tip in New York?",
    "How do I teach my son to ride a bicycle?",
)


class Remembering(Embedder):
    """The default embedder; a text is embedded once for all tests."""

    def __init__(self, embedder: Embedder) -> None:
        self.id, self.name = embedder.id, embedder.name
        self._embedder, self._known = embedder, dict[str, Any]()

    def embed(self, texts: Sequence[str]) -> Any:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def tiny_records() -> list[Record]:
    """Every fact in one train wording of five, and skills."""
    rows = [row for domain in DOMAINS for row in train_records(domain) if row["id"].endswith("-q0")]
    skills = [{**row, "domain": MATHEMATICS} for row in replay_records(120, seed=0)]
    return [Record.from_dict(row, where="tiny") for row in [*rows, *skills]]


def heldout_records() -> list[Record]:
    """60 questions of the benchmark of each domain: taught facts in new wordings, and skills."""
    found = []
    for domain, files in {**{d: (d,) for d in DOMAINS}, MATHEMATICS: ("arithmetic", "reasoning")}.items():
        lines = [line for f in files for line in (SUITE_DATA_DIR / f"{f}.jsonl").read_text().splitlines()]
        for item in map(json.loads, lines[:: len(lines) // 60][:60]):
            found.append(record(item["question"], "?", domain=domain, id=item["id"]))
    return found


@pytest.fixture(scope="session")
def embedder() -> Remembering:
    return Remembering(Embedder.load())


@pytest.fixture(scope="session")
def router(embedder: Remembering) -> Router:
    return Router.train(tiny_records(), embedder=embedder, adapters=ADAPTERS)
