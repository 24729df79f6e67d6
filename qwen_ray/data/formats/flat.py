"""Questions and answers in fields of their own: Alpaca, Dolly, prompt/completion, multiple choice, seeds."""

from __future__ import annotations

from typing import Any

from qwen_ray.data.formats.fields import EMPTY, Fault, Row, example, exchange, text_of, turn
from qwen_ray.data.questions import LETTERS, lay_out


def from_alpaca(row: Row, where: str) -> Row:
    """``instruction``, ``input``, ``output``; also ``system`` and ``history``, pairs of earlier turns."""
    history = row.get("history") or []
    earlier = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise Fault("'history' must be a list of [question, answer] pairs", where=where)
        earlier += [turn("user", pair[0]), turn("assistant", pair[1])]
    question = _with_context(row, "input", where)
    messages = exchange(question, text_of(row, "output", where), system=text_of(row, "system", where))
    messages[-2:-2] = earlier
    return example(row, messages, where)


def from_dolly(row: Row, where: str) -> Row:
    """``instruction``, ``context``, ``response``."""
    question = _with_context(row, "context", where)
    return example(row, exchange(question, text_of(row, "response", where)), where)


def from_prompt_completion(row: Row, where: str) -> Row:
    """``prompt`` and ``completion``, both text."""
    return example(row, exchange(text_of(row, "prompt", where), text_of(row, "completion", where)), where)


def from_question_answer(row: Row, where: str) -> Row:
    """``question`` and ``answer``, as in GSM8K."""
    return example(row, exchange(text_of(row, "question", where), text_of(row, "answer", where)), where)


def from_multiple_choice(row: Row, where: str) -> Row:
    """``question``, ``choices`` (or columns A, B, …) and ``answer``: place from 0, letter or text."""
    choices = row.get("choices")
    if choices is None:
        choices = [row[letter] for letter in LETTERS if row.get(letter) not in (None, "")]
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(LETTERS)
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise Fault(f"'choices' must be a list of 2 to {len(LETTERS)} texts", where=where)
    right = _right_choice(row.get("answer"), choices, where)
    question = text_of(row, "question", where)
    # Without a question the choices alone would pass for one.
    asked = lay_out(question, choices) if question.strip() else ""
    return example(row, exchange(asked, f"{LETTERS[right]}. {choices[right]}"), where)


def from_seed_task(row: Row, where: str) -> list[Row]:
    """A self-instruct seed task: one example for each of ``instances`` (arXiv 2212.10560)."""
    instances = row.get("instances")
    if not isinstance(instances, list) or not all(isinstance(case, dict) for case in instances):
        raise Fault("'instances' must be a list of objects with input and output", where=where)
    if not instances:
        raise Fault("a seed task without instances", where=where, fix="leave it out", reason=EMPTY)
    found = []
    for number, case in enumerate(instances, start=1):
        one = {**row, "input": case.get("input"), "output": case.get("output")}
        made = from_alpaca(one, where if len(instances) == 1 else f"{where} instance {number}")
        if number > 1 and "id" in made:
            made["id"] += f"-{number}"
        found.append(made)
    return found


def _with_context(row: Row, key: str, where: str) -> str:
    """The instruction, and below it what it is about."""
    question = text_of(row, "instruction", where)
    if context := text_of(row, key, where).strip():
        return f"{question}\n\n{context}" if question.strip() else context
    return question


def _right_choice(answer: Any, choices: list[str], where: str) -> int:
    readings: set[int] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        readings = {answer}
    elif isinstance(answer, str):
        said = answer.strip()
        readings = {i for i, choice in enumerate(choices) if choice.strip() == said}
        if len(said) == 1 and said.upper() in LETTERS:
            readings.add(LETTERS.index(said.upper()))
        if len(said) == 1 and said in "01234567":
            readings.add(int(said))
    fitting = sorted(reading for reading in readings if 0 <= reading < len(choices))
    if not fitting:
        raise Fault("'answer' must be the place (from 0), the letter or the text of a choice", where=where)
    if len(fitting) > 1:
        letters = " or ".join(LETTERS[i] for i in fitting)
        raise Fault(
            f"unsure of the answer: '{str(answer)[:40]}' could be choice {letters}",
            where=where,
            fix="give its letter or, as a number, its place from 0",
        )
    return fitting[0]
