"""Architectures: the names of a checkpoint's tensors, and its layers run one at a time."""
