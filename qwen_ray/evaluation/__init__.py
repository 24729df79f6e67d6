"""Benchmarks through lm-eval, and honest comparison of their results."""
