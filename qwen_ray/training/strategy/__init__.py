"""How a model is spread over workers: one file a strategy, all with the interface of ddp.Ddp."""
