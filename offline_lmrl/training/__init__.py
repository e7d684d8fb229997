"""What all trainers share: configs, the base of the trainers, the loop of those that generate data, checkpoints."""
