"""What other libraries are told about packed models, when they are imported."""
