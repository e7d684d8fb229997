"""Scored dialogues and everything that reads, checks, renders and batches them; import the modules by name."""
