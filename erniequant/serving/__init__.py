"""Serving a model through OpenAI's API, by servers that others wrote: the plugin for vLLM, and the
command that checks, then starts vLLM or transformers' own server."""
