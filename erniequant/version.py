"""The version of this package, written into every file it makes."""

__version__ = "0.1.0"
PRODUCER = f"erniequant {__version__}"
