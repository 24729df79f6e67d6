"""Train the base's tokenizer: byte-level BPE with Qwen's own pre-tokenization, small vocabulary.

The split expression is the one of the Qwen2 tokenizer (Hugging Face ``transformers``,
``tokenization_qwen2.py``): digits stand alone, a word takes its leading space along.
"""

import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwen_ray.tiny.corpus import documents
from qwen_ray.tiny.template import CHAT_TEMPLATE, END_OF_TEXT, assistant_turn, user_turn

VOCAB_SIZE = 2048
CONTEXT_LENGTH = 512  # tokens
TRAINING_DOCUMENTS = 20_000

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """Train on the first documents of the corpus of this seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        "".join(user_turn(user) + assistant_turn(answer) for user, answer in turns)
        for turns in itertools.islice(documents(seed), TRAINING_DOCUMENTS)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(out: Path, seed: int) -> None:
    """Train and write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template)."""
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(seed).save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
