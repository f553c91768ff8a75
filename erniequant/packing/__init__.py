"""How packed weights are laid out: schema, rotation, decoding, and whether files keep to it."""
