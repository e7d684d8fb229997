"""The commands of the console script `offline-lmrl`."""
