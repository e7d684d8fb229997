"""New names of settings that were renamed in version 0.2, which still accepts the old names.

The same functions rename what an earlier version wrote to runs, checkpoints and results, whenever these are read.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from offline_lmrl.errors import InputError, shown
from offline_lmrl.settings import Word

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
# Settings that are in another mapping now: mapping that held them -> old name -> dotted new name in that mapping.
MOVED = {
    "args": {
        name: f"decoding.{name}"
        for name in ("ask", "beta", "candidates", "clip", "condition_scale", "q_reduce", "support")
    }
}
# Values of settings: new name of the setting -> old value -> new value.
VALUES = {"reward_at": {"terminal": "end"}, "algorithm": {"iql": "awr"}}
CONFIGS = {"maze/iql": "maze/awr"}  # shipped configs
# Mappings whose keys are not ours (of environments, data, libraries, tables and templates) stay as they are.
FOREIGN = (
    "environment",
    "training_environment",
    "settings",
    "prepare",
    "scratch",
    "lora",
    "labels",
    "tables",
    "template_text",
    "reference",
)
# `evaluate RUN` of version 0.1: name of the command that has these flags now -> the flags; all others are in both.
EVALUATE = {
    "play": "environment settings episodes seed repeats cluster batch_size output asks planner".split(),
    "logs": "data split reward betas fqe show".split(),
}
CHOSEN = "methods"  # the mapping whose keys are names that users chose


def current(block: Any, where: str = "", path: str = "") -> Any:
    """Return settings with old names and values replaced by the current ones, at every level.

    Args:
      block: a mapping, such as a config, or a list of mappings; anything else is returned unchanged.
      where: the user's file that it is from, for errors and a warning about each old name; "" = no warning.
      path: dotted name of the mapping in the file, with a dot at its end; "" = the top of the file.
    Raises: InputError if a setting is given under both names.
    """
    if isinstance(block, list):
        return [current(value, where, path) for value in block]
    if not isinstance(block, Mapping):
        return block
    file, found = where and f"{where}: ", {}
    for key, value in block.items():
        name = KEYS.get(key, key) if isinstance(key, str) else key
        if name != key:
            if name in block:
                raise InputError(f"{file}{path}{key}: found it with {name}, its new name, expected only one of them")
            _warn(file, f"{path}{key}", f"{path}{name}")
        below = f"{path}{name}."
        if isinstance(value, str) and value in VALUES.get(name, {}):
            _warn(file, f"{path}{name}: {value}", f"{path}{name}: {VALUES[name][value]}")
            value = VALUES[name][value]
        elif name == CHOSEN and isinstance(value, Mapping):
            value = {own: current(settings, where, f"{below}{own}.") for own, settings in value.items()}
        elif name not in FOREIGN:
            value = current(value, where, below)
        found[name] = value
    return _moved(found, file, path)


def _moved(block: Mapping[str, Any], file: str, path: str) -> Mapping[str, Any]:
    """Return a mapping with the settings of MOVED in the mapping that holds them now.

    Args:
      block: the mapping.
      file: start of messages; "" = no warning.
      path: dotted name of the mapping in the file, with a dot at its end; its last part chooses the entry of MOVED.
    Raises: InputError if a setting is given in both places.
    """
    moves = MOVED.get(path.rstrip(".").rpartition(".")[2], {})
    found = {key: value for key, value in block.items() if key not in moves}
    for key in (key for key in block if key in moves):
        group, _, name = moves[key].partition(".")
        inner = found.get(group) or {}
        if name in inner:
            raise InputError(f"{file}{path}{key}: found it with {moves[key]}, its new name, expected only one of them")
        _warn(file, f"{path}{key}", f"{path}{moves[key]}")
        found[group] = {**inner, name: block[key]}
    return found


def current_keys(named: Mapping[str, Word]) -> dict[str, Any]:
    """Return the settings of a command line under their current names, with current values and a warning if old.

    Args:
      named: dotted key -> value.
    """
    found = {}
    for key, word in named.items():
        value = word.value if isinstance(word.value, Mapping) else word
        block: Any = value
        for part in reversed(key.split(".")):
            block = {part: block}
        new, path = current(block, "the command line"), []
        while isinstance(new, Mapping) and (value is word or len(path) < key.count(".") + 1):
            ((name, new),) = new.items()
            path.append(name)
        if new != value:
            word = Word(json.dumps(new) if isinstance(new, Mapping) else new, new)
        found[".".join(path)] = word
    return found


def evaluate_commands(argv: Sequence[str], holds_comparisons: Callable[[str], bool]) -> list[list[str]]:
    """Return what `evaluate RUN` of version 0.1 is now, with a warning.

    Args:
      argv: the command line after `evaluate`.
      holds_comparisons: True for a path of comparisons.
    Returns: "play", "logs" or "scorer", with the words after it, of each command to run.
    Raises: InputError if the flags choose none of them.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data", nargs="?")
    data = early.parse_known_args(argv)[0].data
    part, words = "", {"play": [], "logs": [], "": []}
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].partition(".")[0]
            part = next((part for part, flags in EVALUATE.items() if name in flags), "")
        words[part].append(word)
    parts = [part for part in EVALUATE if words[part]]
    if data is not None and holds_comparisons(data):
        parts, words["scorer"] = ["scorer"], words["logs"] + words["play"]
    if not parts:
        raise InputError(f"evaluate: found {shown(argv[0])}, expected play, logs or scorer")
    names = " and ".join(f"evaluate {part} RUN" for part in parts)
    _warn("offline-lmrl ", "evaluate RUN", names)
    return [[part, *words[""], *words[part]] for part in parts]


def _warn(before: str, old: str, new: str) -> None:
    if before:
        logging.getLogger(__name__).warning(
            "%s%s is now called %s; version 0.2 is the last to accept the old name", before, old, new
        )
