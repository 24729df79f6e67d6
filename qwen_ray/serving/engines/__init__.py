"""Engines: what turns token ids into log-probabilities and new tokens."""
