"""The layout of packed weights: schema, rotation, decoding, and checks of files against it."""
