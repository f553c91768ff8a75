"""Serving: the plugin for vLLM, and the command that starts a server."""
