"""Importers that write training data to disk, one module per public format or scripted game."""
