"""Speed of vLLM with packed experts."""
