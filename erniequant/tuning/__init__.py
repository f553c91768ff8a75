"""What is not packed learns to make up for what is."""
