"""The on-disk format: schema, check of a checkpoint's headers, inspection and verification."""
