"""Serving: one base model and any number of LoRA adapters behind an OpenAI-compatible API."""
