"""Verbs of qwen-ray as jobs of a Ray cluster that is elsewhere."""
