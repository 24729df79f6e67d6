"""What ``qwen-ray data prepare`` does: parts of the sources, the choice among them, the files it leaves."""
