"""The sets of the hub in the catalogue: SciQ, Dolly, OpenAssistant, a part of FLAN, MMLU's auxiliary set."""

from __future__ import annotations

from typing import Any

from qwen_ray.data.formats.oasst import threads
from qwen_ray.data.questions import LETTERS, lay_out, multiple_choice
from qwen_ray.data.sources.entries import string, strings
from qwen_ray.data.sources.hub import Conversation, HubSet, hub_source

Row = dict[str, Any]

FLAN_TASKS = ("arc_challenge", "arc_easy", "natural_questions", "openbookqa", "trivia_qa")
"""The tasks of FLAN 2021 that are read: those that ask for knowledge."""
_FLAN_FILES = tuple(f"train/{task}_10templates*" for task in FLAN_TASKS)


def _sciq(row: Row) -> Conversation | None:
    """``question``, ``correct_answer``, ``distractor1`` to ``distractor3``."""
    question, answer = string(row.get("question")), string(row.get("correct_answer"))
    wrong = strings([row.get(f"distractor{i}") for i in (1, 2, 3)])
    pair = multiple_choice(question, answer, wrong, key=question) if question and answer else None
    return Conversation(pair) if pair else None


def _dolly(row: Row) -> Conversation | None:
    """``instruction``, ``context``, ``response``, ``category``."""
    question, context = string(row.get("instruction")), string(row.get("context"))
    asked = f"{question}\n\n{context}" if context else question
    return Conversation((asked, string(row.get("response"))), string(row.get("category")))


def _thread(row: Row) -> Conversation | None:
    """``messages`` of a thread, as :func:`~qwen_ray.data.formats.oasst.threads` joins them."""
    said = row.get("messages")
    turns = (
        [string(turn.get("content")) for turn in said if isinstance(turn, dict)]
        if isinstance(said, list)
        else []
    )
    return Conversation(tuple(turns))


def _flan(row: Row) -> Conversation | None:
    """``inputs``, ``targets``, ``task``."""
    task = string(row.get("task")).split("_10templates")[0]
    return Conversation((string(row.get("inputs")), string(row.get("targets"))), task)


def _mmlu(row: Row) -> Conversation | None:
    """``question``, ``choices``, ``answer`` (an index), in one layout below the key ``train``."""
    row = row["train"] if isinstance(row.get("train"), dict) else row
    question, listed, answer = string(row.get("question")), row.get("choices"), row.get("answer")
    choices = strings(listed)
    whole = isinstance(listed, list) and len(choices) == len(listed) <= len(LETTERS)
    if not question or not whole or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return None
    return Conversation((lay_out(question, choices), f"{LETTERS[answer]}. {choices[answer]}"))


SOURCES = (
    hub_source(
        HubSet("sciq", "allenai/sciq", "CC-BY-NC-3.0", (("data/train-*",), ("train.json*",)), _sciq),
        title="SciQ: science examination questions, training split (non-commercial)",
        domain_hint="biology",
        size="11,679 four-choice questions of biology, chemistry, physics",
    ),
    hub_source(
        HubSet(
            "dolly",
            "databricks/databricks-dolly-15k",
            "CC-BY-SA-3.0",
            (("databricks-dolly-15k.jsonl",), ("data/train-*",)),
            _dolly,
        ),
        title="Dolly 15k: instructions written by people",
        domain_hint="general",
        size="15,011 instructions in 8 categories",
    ),
    hub_source(
        HubSet("oasst1", "OpenAssistant/oasst1", "Apache-2.0", (("data/train-*",),), _thread, join=threads),
        title="OpenAssistant 1: the best-ranked English conversation of each tree",
        domain_hint="general",
        size="about 3,700 conversations, of 84,437 messages in many languages",
    ),
    hub_source(
        HubSet(
            "flan", "Muennighoff/flan", "LicenseRef-FLAN-tasks", (_FLAN_FILES,), _flan, hub_files=_FLAN_FILES
        ),
        title=f"FLAN 2021: {', '.join(FLAN_TASKS)} (each task has its own licence)",
        domain_hint="general",
        size="some 10,000s of questions",
    ),
    hub_source(
        HubSet(
            "mmlu_auxiliary",
            "cais/mmlu",
            "MIT",
            (("all/auxiliary_train-*",), ("auxiliary_train/train-*",), ("auxiliary_train*",)),
            _mmlu,
            config="all",
            split="auxiliary_train",
        ),
        title="MMLU's auxiliary training set (of ARC, MCTest, OBQA, RACE, with licences of their own)",
        domain_hint="general",
        size="99,842 four-choice questions",
    ),
)
