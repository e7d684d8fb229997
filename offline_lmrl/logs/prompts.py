"""Read prompts: the dialogues that a run replies to."""

import sys
from collections import Counter
from pathlib import Path

from offline_lmrl.errors import InputError
from offline_lmrl.logs.messages import DIALOGUES, read_request
from offline_lmrl.logs.record import Record
from offline_lmrl.logs.trajectory import Turn, parse_json


def read_prompts(source: str) -> list[list[Turn]]:
    """Read the dialogues to reply to, one per line that is not blank.

    A line is a user turn as plain text, or a JSON object with the field `prompt` (text, or a list of messages) or
    `messages` (or another name that logs use for it, such as `conversations`).

    Args:
      source: path of the file; "-" = stdin.
    Returns: the turns of each dialogue.
    Raises: InputError "source:line: field: ..." if a line cannot be read or there is no prompt.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: text: found bytes that are not UTF-8, expected UTF-8") from error
    name = "stdin" if source == "-" else source
    lines = enumerate(text.split("\n"), 1)
    histories = [_prompt(line.strip(), f"{name}:{number}") for number, line in lines if line.strip()]
    if not histories:
        raise InputError(f"{name}: found no prompt, expected one per line")
    return histories


def _prompt(line: str, where: str) -> list[Turn]:
    if not line.startswith("{"):
        return [Turn("user", line)]
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: JSON: found a line that does not parse: {error}") from error
    field = next((name for name in DIALOGUES if name in row), "prompt")
    return read_request(Record(row, where, Counter()), field)
