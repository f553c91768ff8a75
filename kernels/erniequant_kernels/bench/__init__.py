"""Time of a layer's experts, packed and in bfloat16, on the GPU at hand."""
