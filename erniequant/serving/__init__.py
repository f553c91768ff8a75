"""Serving a model through OpenAI's API, by servers that others wrote."""
