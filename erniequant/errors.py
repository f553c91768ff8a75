"""The errors a user may see. Each message is one line: what is wrong, where, and what to do."""


class ErnieQuantError(Exception):
    """A refusal or failure with a one-line reason; the command line prints it and exits with 1."""
