"""Sources of training data, one module per public data format or scripted game.

Each module has one dataclass: its fields are the settings of the command `offline-lmrl prepare SOURCE`, and its method
`prepare` writes the data. In these modules, a row is one line of the source, and a group is a set of rows about one
prompt or conversation, which must all be in the same split.
"""
