"""Images beside text: reading them, and what a model is given of them."""
