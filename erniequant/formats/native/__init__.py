"""Our own layout, docs/format.md: written, loaded, inspected, verified and exported."""
