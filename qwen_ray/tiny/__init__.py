"""The embedded base model: a small Qwen2 that counts well and knows no facts.

The package ships the weights, the facts a fine-tuning run can teach it, the benchmark
that measures the lesson, and the script that makes the base (``qwen_ray.tiny.pretrain``).
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder with the shipped checkpoint, tokenizer and chat template."""

__all__ = ["MODEL_DIR"]
