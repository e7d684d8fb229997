"""New names of settings that were renamed in version 0.2, which still accepts the old names.

The same functions rename what an earlier version wrote to runs, checkpoints and results, whenever these are read.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from offline_lmrl.errors import InputError

log = logging.getLogger(__name__)

# Settings, entries of a run's config, and fields of checkpoints: old name -> new name.
KEYS = {
    "sampling": "decoding",
    "prompt": "few_shot",
    "critic": "value_model",
    "judge": "reward_model",
    "place": "reward_at",
    "contents": "input_hashes",
    "critic_weights": "value_weights",
    "memory": "state",
}
# Values of settings: new name of the setting -> old value -> new value.
VALUES = {"reward_at": {"terminal": "end"}, "algorithm": {"iql": "awr"}}
# Mappings whose keys are not ours (of environments, data, libraries, tables and templates) stay as they are.
FOREIGN = ("environment", "training_environment", "prepare", "scratch", "lora", "tables", "template_text", "reference")
CHOSEN = "methods"  # the mapping whose keys are names that users chose


def current(block: Any, where: str = "") -> Any:
    """Return a mapping of settings with old names and values replaced by the current ones, at every level.

    Args:
      block: the mapping, such as a config; anything else is returned unchanged.
      where: the user's file that the mapping is from, named in a warning about each old name; "" = no warning.
    Raises: InputError if a setting is given under both names.
    """
    if not isinstance(block, Mapping):
        return block
    found: dict[Any, Any] = {}
    for key, value in block.items():
        name = KEYS.get(key, key) if isinstance(key, str) else key
        if name != key:
            if name in block:
                raise InputError(f"{key}: found it beside {name}, which is its new name, expected only one of them")
            _warn(where and f"{where}: ", key, name)
        if isinstance(value, str) and value in VALUES.get(name, {}):
            _warn(where and f"{where}: ", f"{name}: {value}", f"{name}: {VALUES[name][value]}")
            value = VALUES[name][value]
        elif name == CHOSEN and isinstance(value, Mapping):
            value = {own: current(settings, where) for own, settings in value.items()}
        elif name not in FOREIGN:
            value = current(value, where)
        found[name] = value
    return found


def current_flags(argv: Sequence[str]) -> list[str]:
    """Replace old names of flags (--args.sampling.top_p) and old values of settings in a command line, with a warning.

    Args:
      argv: the words of the command line, without the program.
    """
    found: list[str] = []
    for word in argv:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            parts = key.split(".")
            foreign = next((i for i, part in enumerate(parts) if part in FOREIGN), len(parts))
            own = 1 if parts[0] == CHOSEN else None
            name = ".".join(KEYS.get(part, part) if i < foreign and i != own else part for i, part in enumerate(parts))
            if name != key:
                _warn("--", key, name)
            found.append(f"--{name}{equals}{_value(name, value)}")
        else:
            named = found[-1][2:] if found and found[-1].startswith("--") and "=" not in found[-1] else ""
            found.append(_value(named, word))
    return found


def _value(flag: str, value: str) -> str:
    new = VALUES.get(flag.rpartition(".")[2], {}).get(value, value)
    if new != value:
        _warn("--", f"{flag} {value}", f"{flag} {new}")
    return new


def _warn(before: str, old: str, new: str) -> None:
    if before:
        log.warning("%s%s is now called %s; version 0.2 is the last to accept the old name", before, old, new)
