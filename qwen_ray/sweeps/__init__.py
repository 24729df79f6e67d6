"""Sweeps: many trials of one run, packed onto one base or each by itself, and what came of them."""
