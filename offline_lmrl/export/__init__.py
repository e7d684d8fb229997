"""Plain checkpoints that inference engines serve."""
