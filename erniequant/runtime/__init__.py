"""Running quantised models: the experts module and the transformers plugin."""
