"""Registration of packed models with other libraries, when these are imported."""
