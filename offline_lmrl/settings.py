"""Fields for config dataclasses with their help text in the metadata, as in transformers' TrainingArguments."""

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the text that the command line shows for it.

    Args:
      default: the default, or a function without arguments that makes it, for mutable values such as lists.
      help: what the setting does, its unit, and what null means.
    """
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})
