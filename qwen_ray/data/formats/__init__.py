"""Read training examples in the formats people have them in.

Record JSONL, Alpaca, ShareGPT, OpenAI messages, Dolly, prompt/completion, question/answer, multiple choice,
self-instruct seeds and OpenAssistant; as JSONL, one JSON list, CSV, TSV (these also gzipped) or Parquet. The
format is told by the keys of the first records. What these formats can hold but training here cannot use
(tool calls, images, per-turn loss weights) is refused with its line, never skipped in silence.
"""

from __future__ import annotations

from qwen_ray.data.formats.detection import FORMATS, SAMPLE
from qwen_ray.data.formats.lines import Span, read_text
from qwen_ray.data.formats.reading import detect, load_examples, read_found, spans

__all__ = ["FORMATS", "SAMPLE", "Span", "detect", "load_examples", "read_found", "read_text", "spans"]
