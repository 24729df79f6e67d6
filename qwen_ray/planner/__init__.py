"""What a run needs and costs before it is started: memory by part, step time, money, and what fits."""
