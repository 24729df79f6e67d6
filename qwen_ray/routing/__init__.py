"""Which adapter answers a question: similarity to the training questions of each domain."""
