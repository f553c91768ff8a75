"""Architectures: what a checkpoint's tensors are called and how its layers run."""
