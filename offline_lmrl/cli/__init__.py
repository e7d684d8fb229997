"""The commands of the console script `offline-lmrl`; `main` runs one."""

from offline_lmrl.cli.main import main

__all__ = ["main"]
