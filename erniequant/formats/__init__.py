"""The layouts of a result, each in a room of its own with the same verbs; `registry` lists them."""
