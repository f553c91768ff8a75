"""From the weights of a matrix and the second moments of its inputs to codes."""
