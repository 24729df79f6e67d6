"""Whether machines, a cluster and its storage are fit for what qwen-ray does there."""
