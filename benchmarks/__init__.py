"""Programs that measure erniequant and fill the tables of README and docs/; not installed."""
