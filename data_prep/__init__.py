"""Importers that write training data to disk, one module per public data format or scripted game.

`prepare` of a module is run by the command `offline-lmrl prepare MODULE`. In these modules, a row is one line of the
source, and a group is a set of rows about one prompt or conversation, which must all be in the same split.
"""
