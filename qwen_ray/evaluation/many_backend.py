"""A backend that asks a server about many models together, and keeps what it answers in a journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.evaluation.journal import Answer, Journal, Part, Versions, question_key
from qwen_ray.fsio import sha256_json
from qwen_ray.registry import CANARY
from qwen_ray.serving.backends import (
    PROMPTS_PER_REQUEST,
    TOKENS_PER_REQUEST,
    EndpointBackend,
    Ids,
    Info,
    Item,
    Sampling,
    Scored,
    chunks,
    tokens_of,
    warn_truncated,
)
from qwen_ray.serving.model_id import AUTO, parse

ITEMS_PER_REQUEST = 256  # times models
_PROBE = "The capital of France is Paris."
_KNOWLEDGE = "knowledge base "


class ManyBackend:
    """A backend of :attr:`model`, one of ``models``; what it asks about scores it asks about all of them."""

    def __init__(
        self,
        endpoint: EndpointBackend,
        models: Sequence[str],
        journal: Journal,
        versions: dict[str, Versions],
    ) -> None:
        """``versions``: what each model's answers depend on besides what the answers themselves say."""
        self._endpoint, self._models, self._journal, self._versions = endpoint, models, journal, versions
        self._used: dict[str, dict[str, Answer]] = {model: {} for model in models}
        self.info: Info = endpoint.info
        self.model = models[0]

    def switch(self, model: str) -> None:
        """Answer for ``model`` from now on."""
        self.model, self.info = model, replace(self.info, model=model)

    def encode(self, texts: Sequence[str], *, special: bool | None) -> list[Ids]:
        return self._endpoint.encode(texts, special=special)

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return self._endpoint.render(messages, add_generation_prompt=add_generation_prompt)

    def score(self, items: Sequence[Item], progress: Callable[[int], object]) -> list[list[Scored]]:
        keys = [question_key(*item) for item in items]
        asked: dict[tuple[str, ...], list[Item]] = {}
        for item, key in zip(items, keys, strict=True):
            missing = tuple(model for model in self._models if self._journal.get(model, key) is None)
            asked.setdefault(missing, []).append(item)
        progress(sum(len(continuations) for _, continuations in asked.pop((), [])))
        work = [
            (missing, part)
            for missing, open_items in asked.items()
            for part in chunks(
                open_items,
                max(1, ITEMS_PER_REQUEST // len(missing)),
                tokens_of,
                TOKENS_PER_REQUEST // len(missing),
            )
        ]

        def post(job: tuple[tuple[str, ...], Sequence[Item]]) -> None:
            missing, part = job
            asked_now = [question_key(*item) for item in part]
            kept = []
            for model, reply in zip(missing, self._endpoint.score_each(missing, part), strict=True):
                values = [
                    list(zip(scores["logprobs"], scores["greedy"], strict=True)) for scores in reply["items"]
                ]
                truncated = [scores["truncated"] for scores in reply["items"]]
                kept.append(self._part(model, asked_now, values, reply, truncated))
            self._journal.add(*kept)
            progress(sum(len(continuations) for _, continuations in part))

        self._endpoint.client.map(post, work)
        answers = self._answers(keys)
        warn_truncated(sum(answer.truncated for answer in answers), self.info)
        return [[(float(logprob), bool(greedy)) for logprob, greedy in answer.value] for answer in answers]

    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        progress: Callable[[int], object],
        cut: Sequence[bool] | None = None,
    ) -> list[str]:
        """``cut``: which prompts have lost their start before they came here."""
        cut = cut or [False] * len(prompts)
        # The same prompt may be asked several times, for several samples.
        times: Counter[tuple[int, ...]] = Counter()
        keys = []
        for prompt in prompts:
            keys.append(question_key(prompt, asdict(sampling), times[tuple(prompt)]))
            times[tuple(prompt)] += 1
        missing = [i for i, key in enumerate(keys) if self._journal.get(self.model, key) is None]
        progress(len(prompts) - len(missing))

        def post(part: Sequence[int]) -> None:
            reply = self._endpoint.complete(self.model, [prompts[i] for i in part], sampling)
            texts = [choice["text"] for choice in reply["choices"]]
            asked = [keys[i] for i in part]
            self._journal.add(self._part(self.model, asked, texts, reply, [cut[i] for i in part]))
            progress(len(part))

        self._endpoint.client.map(post, list(chunks(missing, PROMPTS_PER_REQUEST)))
        return [str(answer.value) for answer in self._answers(keys)]

    def _part(
        self,
        model: str,
        keys: Sequence[str],
        values: Sequence[Any],
        reply: dict[str, Any],
        truncated: Sequence[bool],
    ) -> Part:
        prompts = reply["qwen_ray"]["prompts"]
        answers = {
            key: Answer(value, prompt["adapter"], len(prompt.get("citations", ())), cut)
            for key, value, prompt, cut in zip(keys, values, prompts, truncated, strict=True)
        }
        return model, self._versions[model] | _versions_of(model, prompts), answers

    def _answers(self, keys: Sequence[str]) -> list[Answer]:
        answers = []
        for key in keys:
            answer = self._journal.get(self.model, key)
            assert answer is not None, "every answer that was missing has been asked for"
            self._used[self.model][key] = answer
            answers.append(answer)
        return answers

    def account(self, model: str) -> dict[str, Any]:
        """Who gave the model's answers: how many each adapter, how many after reading passages, and how many
        to a context that lost its start."""
        answers = self._used[model].values()
        return {
            "id": model,
            "base": self._versions[model][_base_name(self._endpoint, model)],
            "answers": len(answers),
            "adapters": dict(sorted(Counter(answer.adapter or "base" for answer in answers).items())),
            "with_passages": sum(answer.passages > 0 for answer in answers),
            "truncated": sum(answer.truncated for answer in answers),
            "knowledge_bases": {
                name.removeprefix(_KNOWLEDGE): version
                for name, version in self._versions[model].items()
                if name.startswith(_KNOWLEDGE)
            },
        }


def probe(endpoint: EndpointBackend, models: Sequence[str]) -> dict[str, Versions]:
    """What each model is now: what the server says of it, and its score on one sentence, which tells weights
    without a version apart.

    Raises :class:`UserError` for ``:auto`` while a canary may answer it.
    """
    listed = endpoint.listed()
    routed = {model: _routed(endpoint, model, listed) for model in models if parse(model).auto}
    (ids,) = endpoint.encode([_PROBE], special=False)
    seen: dict[str, Versions] = {}
    for model, reply in zip(models, endpoint.score_each(models, [(ids[:-2], [ids[-2:]])]), strict=True):
        seen[model] = {
            _base_name(endpoint, model): str(listed[endpoint.base(model)].get("fingerprint")),
            f"the score of a test sentence by {model}": float(reply["items"][0]["logprobs"][0]),
            **routed.get(model, {}),
            **{
                f"{_KNOWLEDGE}{name}": version
                for name, version in _read_by(model, listed.get(model, {})).items()
            },
            **_versions_of(model, reply["qwen_ray"]["prompts"]),
        }
    return seen


def _routed(endpoint: EndpointBackend, model: str, listed: dict[str, dict[str, Any]]) -> Versions:
    """The router of an ``:auto`` id, and each adapter that it may choose: one question asks only one."""
    base = endpoint.base(model)
    router = listed.get(f"{base}:{AUTO}", {}).get("router")
    if router is None:
        return {}
    versions: Versions = {"the router": sha256_json(router)[:12]}
    for name in sorted({domain["adapter"] for domain in router["domains"]} - {None}):
        canary = next(
            (
                id
                for id, entry in listed.items()
                if id.startswith(f"{base}:{name}@") and CANARY in entry["adapter"]["aliases"]
            ),
            None,
        )
        if canary is not None:
            raise UserError(
                f"'{model}' cannot be measured while a canary answers a part of what goes to '{name}'",
                where=endpoint.client.url,
                fix=f"wait until it has ended, or leave out '{model}'; '{canary}' is the canary alone",
                status=409,
            )
        versions[_chosen_name(model, name)] = _production(base, name, listed)
    return versions


def _production(base: str, name: str, listed: dict[str, dict[str, Any]]) -> str:
    """What answers where the router chooses ``name``: the base where that is not served."""
    if (entry := listed.get(f"{base}:{name}")) is None:
        return base
    version = entry["adapter"].get("version")  # a folder has none
    return name if version is None else f"{name}@{version}"


def _chosen_name(model: str, adapter: str) -> str:
    return f"{adapter} of {model}"


def _read_by(model: str, listed: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Versions of the knowledge bases that ``model`` reads: the one of its adapter's name, else all."""
    held = listed.get(model, {}).get("knowledge_bases") or ()
    bases = {base["name"]: str(base["version"]) for base in held}
    adapter = str(parse(model).adapter)
    return {adapter: bases[adapter]} if adapter in bases else bases


def _base_name(endpoint: EndpointBackend, model: str) -> str:
    return f"the base {endpoint.base(model)}"


def _versions_of(model: str, prompts: Sequence[dict[str, Any]]) -> Versions:
    """What answered, and what was read, by name. Two versions of one name become a third."""
    found: dict[str, set[str]] = {}
    for prompt in prompts:
        if prompt["adapter"] is not None:
            name = prompt["adapter"].partition("@")[0]
            said = _chosen_name(model, name) if parse(model).auto else model
            found.setdefault(said, set()).add(prompt["adapter"])
        for citation in prompt.get("citations", ()):
            name = f"{_KNOWLEDGE}{citation['knowledge_base']}"
            found.setdefault(name, set()).add(str(citation["version"]))
    return {name: " and ".join(sorted(versions)) for name, versions in found.items()}
