"""Logged dialogues and comparisons of replies: their classes, and how they are read, converted, checked and written.

Import the modules by name.
"""
