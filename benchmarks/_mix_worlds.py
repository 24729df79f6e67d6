"""Small worlds in which every mix can be tried: a toy base, three new domains and a replay source.

A domain is a Markov chain over words. It has words of its own, and a share of its words is common to all
domains, the replay source too. After a common word each domain has its own table of next words: there they
are in conflict, and what is learned from one is wrong in the others. The base has learned the replay source,
and that other words exist.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_ray.config import RunConfig, build_config
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.fsio import write_json

REPLAY = "replay"
NEW = ("one", "two", "three")
DOMAINS = (*NEW, REPLAY)
WORDS = 48
"""Words that a domain uses, its own and the common ones."""
NEXT = 4
"""Words that can follow a word."""
LENGTH = 32
"""Words of a record: the first is the question, the others are the answer."""
TRAINED, HELD_OUT = 300, 64
"""Records of each domain."""
_PAD = "<pad>"
_PRETRAINING = {"steps": 300, "batch": 16, "rate": 5e-3, "other_words": 0.3}


@dataclass(frozen=True)
class World:
    """The chains of one world. ``common``: share of each domain's words that all domains use."""

    seed: int
    common: float

    @property
    def _shared(self) -> int:
        return round(self.common * WORDS)

    @property
    def vocabulary(self) -> int:
        return self._shared + len(DOMAINS) * (WORDS - self._shared)

    def sample(self, domain: str, count: int, *, part: int) -> np.ndarray:
        """``count`` records as numbers of words, [count, LENGTH]. ``part`` numbers independent samples."""
        number, own = DOMAINS.index(domain), WORDS - self._shared
        first = self._shared + number * own
        words = np.concatenate([np.arange(self._shared), np.arange(first, first + own)])
        rng = np.random.default_rng([self.seed, number])
        follows = np.stack([rng.choice(WORDS, NEXT, replace=False) for _ in range(WORDS)])
        bounds = rng.dirichlet(np.full(NEXT, 0.5), WORDS).cumsum(1)
        rng = np.random.default_rng([self.seed, number, 1 + part])
        places = np.empty((count, LENGTH), dtype=np.int64)
        places[:, 0] = rng.integers(WORDS, size=count)
        for t in range(1, LENGTH):
            before = places[:, t - 1]
            choice = (rng.random(count)[:, None] > bounds[before]).sum(1).clip(max=NEXT - 1)
            places[:, t] = follows[before, choice]
        return words[places]

    def build(self, folder: Path) -> RunConfig:
        """Write the base, the data and the held-out data; returns the run that trains on them."""
        _write_tokenizer(folder / "base", self.vocabulary)
        self._pretrain(folder / "base")
        for domain in DOMAINS:
            _write_records(folder / f"{domain}.jsonl", domain, self.sample(domain, TRAINED, part=1))
            _write_records(folder / f"{domain}-held-out.jsonl", domain, self.sample(domain, HELD_OUT, part=2))
        return build_config(flags=_settings(folder))

    def _pretrain(self, folder: Path) -> None:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(self.seed)
        settings = Qwen2Config(
            vocab_size=self.vocabulary + 257,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=self.vocabulary + 256,
            eos_token_id=self.vocabulary + 256,
            bos_token_id=None,
        )
        model = Qwen2ForCausalLM(settings)
        steps, batch, rate, other = _PRETRAINING.values()
        data = self.sample(REPLAY, int(steps * batch), part=0)
        rng = np.random.default_rng([self.seed, len(DOMAINS)])
        noise = rng.random(len(data)) < other
        data[noise] = rng.integers(self.vocabulary, size=(int(noise.sum()), LENGTH))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
        for step, rows in enumerate(torch.from_numpy(data).split(int(batch))):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
        model.save_pretrained(str(folder))


def _settings(folder: Path) -> Mapping[str, Any]:
    return {
        "model.name": str(folder / "base"),
        "data.train": [str(folder / f"{domain}.jsonl") for domain in DOMAINS],
        "data.validation": [str(folder / f"{domain}-held-out.jsonl") for domain in DOMAINS],
        "data.max_length": LENGTH,
        "data.packing": False,
        "method.r": 8,
        "method.alpha": 8,
        "method.dropout": 0.0,
        "optim.learning_rate": 4e-3,
        "optim.batch_size": 4,
        "optim.gradient_accumulation": 1,
        "optim.max_steps": 60,
        "optim.warmup_steps": 10,
        "tracking.wandb": "off",
        "out": str(folder / "run"),
    }


def _write_tokenizer(folder: Path, words: int) -> None:
    """Qwen2's kind, in which a word is a letter of two bytes; and a chat template that adds nothing."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    pairs = [split(letter)[0][0] for letter in _letters(words)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*pairs, *alphabet, _PAD]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [list(pair) for pair in pairs],
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        "pre_tokenizer": level,
        "decoder": level,
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": _PAD,
        "eos_token": _PAD,
        "chat_template": "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}",
    }
    folder.mkdir(parents=True)
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        write_json(folder / name, content)


def _letters(count: int) -> str:
    """Letters of the Cyrillic block, which UTF-8 writes as two bytes."""
    letters = (chr(i) for i in range(0x0400, 0x0530))
    return "".join([c for c in letters if unicodedata.category(c).startswith("L")][:count])


def _write_records(path: Path, domain: str, rows: np.ndarray) -> None:
    letters = np.array(list(_letters(int(rows.max()) + 1)))
    messages = [
        (Message("user", question), Message("assistant", "".join(answer)))
        for question, *answer in letters[rows]
    ]
    write_records(
        path,
        [Record(f"{path.stem}-{i}", m, domain, "generated", "CC0-1.0") for i, m in enumerate(messages)],
    )
