"""Make the embedded base: tokenizer, pretraining, scores, all from one command.

python -m qwen_ray.tiny.pretrain --out DIR --seed 11
"""

import argparse
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qwen_ray.tiny.benchmark import CATEGORIES, build_items
from qwen_ray.tiny.corpus import Document, documents
from qwen_ray.tiny.initialization import look_back
from qwen_ray.tiny.muon import Muon
from qwen_ray.tiny.scoring import score
from qwen_ray.tiny.template import assistant_turn, user_turn
from qwen_ray.tiny.tokenizer import CONTEXT_LENGTH, write_tokenizer

COMMAND = "python -m qwen_ray.tiny.pretrain --out DIR"
PROMPT_WEIGHT = 0.05  # loss weight of user tokens; 1 for the assistant's
POOL_BATCHES = 16  # batches are cut from pools this large, sorted by length
VALIDATION_SEED = 1  # another seed than the benchmark's: progress is watched on other items


@dataclass(frozen=True)
class PretrainConfig:
    """Everything the result depends on, apart from library versions and hardware."""

    seed: int = 11
    steps: int = 2800
    batch_size: int = 96  # documents
    learning_rate: float = 5e-3
    final_learning_rate: float = 0.03  # as a share of the peak
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """Token ids of a document and the loss weight of each."""

    ids: list[int]
    weights: list[float]


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """A randomly initialized Qwen2 of about 1.05 million parameters, in float32."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        # Texts are about a hundred tokens long, so positions may turn fast.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    look_back(model)
    return model


def encode(tokenizer: PreTrainedTokenizerBase, documents_: Sequence[Document]) -> list[Encoded]:
    """Tokenize documents turn by turn."""
    pieces: list[str] = []
    for turns in documents_:
        for user, answer in turns:
            pieces += [user_turn(user), assistant_turn(answer)]
    tokens = iter(tokenizer(pieces)["input_ids"])
    encoded = []
    for turns in documents_:
        ids: list[int] = []
        weights: list[float] = []
        for _ in turns:
            prompt, answer_ids = next(tokens), next(tokens)
            ids += prompt + answer_ids
            weights += [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer_ids)
        encoded.append(Encoded(ids, weights))
    return encoded


def batches(
    tokenizer: PreTrainedTokenizerBase, corpus: Iterable[Document], config: PretrainConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, weights), both of shape (batch, longest document), right-padded."""
    source = iter(corpus)
    rng = random.Random(f"{config.seed}-batches")
    pad = int(tokenizer.pad_token_id)
    while True:
        drawn = list(itertools.islice(source, config.batch_size * POOL_BATCHES))
        # Similar lengths share a batch, which saves padding; the noise mixes neighbours.
        pool = sorted(encode(tokenizer, drawn), key=lambda e: len(e.ids) + 3 * rng.random())
        cuts = [pool[i : i + config.batch_size] for i in range(0, len(pool), config.batch_size)]
        rng.shuffle(cuts)
        for cut in cuts:
            width = max(len(e.ids) for e in cut)
            ids = [e.ids + [pad] * (width - len(e.ids)) for e in cut]
            weights = [e.weights + [0.0] * (width - len(e.ids)) for e in cut]
            yield torch.tensor(ids), torch.tensor(weights)


def weighted_loss(model: Qwen2ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean next-token loss in nats; logits only where the weight is not zero."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = weights[:, 1:] > 0
    used = weights[:, 1:][counted]
    logits = model.lm_head(hidden[counted])
    losses = functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    return (losses * used).sum() / used.sum()


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine down to the final share."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
    return warm * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def make_optimizers(model: Qwen2ForCausalLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding, norms and biases."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in model.named_parameters():
        (matrices if param.dim() > 1 and "embed" not in name else others).append(param)
    return [
        Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainConfig,
) -> Iterator[tuple[int, float, int]]:
    """Train in place; yields (step, loss, tokens so far) after each step. Padding counts."""
    optimizers = make_optimizers(model, config)
    stream = batches(tokenizer, documents(config.seed), config)
    tokens = 0
    model.train()
    for step in range(config.steps):
        ids, weights = next(stream)
        tokens += ids.numel()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        yield step + 1, loss.item(), tokens


def save_model(model: Qwen2ForCausalLM, out: Path) -> None:
    """Write config, generation config and float16 weights.

    The config still says float32, so that the model loads in float32 by default: CPUs
    compute float16 slowly, and rounding the stored weights costs no accuracy.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(out)
    end = model.config.eos_token_id
    greedy = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False)
    greedy.save_pretrained(out)
    state = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    weights = out / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # save_file makes it private; a package must be readable by all


def final_scores(out: Path) -> dict[str, Any]:
    """Benchmark scores of the model as it was saved, by category."""
    model = Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    return {category: score(model, tokenizer, build_items(category)) for category in CATEGORIES}


def pretrain(out: Path, config: PretrainConfig, report_every: int = 250) -> dict[str, Any]:
    """Build tokenizer and base in ``out`` and return what ``training.json`` says."""
    started, started_cpu = time.time(), time.process_time()
    write_tokenizer(out, config.seed)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = new_model(tokenizer, config.seed)
    validation = build_items("arithmetic", VALIDATION_SEED)
    validation += build_items("reasoning", VALIDATION_SEED)
    recent: list[float] = []
    tokens = 0
    for step, loss, tokens in train(model, tokenizer, config):
        recent = [*recent[-99:], loss]
        if step % report_every == 0 or step == config.steps:
            save_model(model, out)
            kinds = score(model, tokenizer, validation)["by_kind"]
            mean = sum(recent) / len(recent)
            cpu = time.process_time() - started_cpu
            print(f"step {step} loss {mean:.3f} tokens {tokens} cpu {cpu:.0f}s {kinds}", flush=True)
    summary = {
        "command": f"{COMMAND} --seed {config.seed} --steps {config.steps}",
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(time.process_time() - started_cpu),
        "wall_seconds": round(time.time() - started),
        "final_loss": round(sum(recent) / max(1, len(recent)), 4),
        "scores": final_scores(out),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the embedded base model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=PretrainConfig.seed)
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument("--report-every", type=int, default=250, metavar="STEPS")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = PretrainConfig(seed=args.seed, steps=args.steps)
    summary = pretrain(args.out, config, args.report_every)
    print(json.dumps(summary["scores"], indent=2))


if __name__ == "__main__":
    main()
