"""Run the PTX of a Triton kernel without a GPU, and count what its memory accesses take."""
