"""Loading, running and saving packed models with transformers."""
