"""Make text of logs, models and files safe to print on a terminal."""

import re

# Control characters except line feed and tab, characters that reverse the direction of text, line separators other
# than line feed, and halves of surrogate pairs, which cannot be printed.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape control characters in text as JSON does: `\u001b[2J` is printed and does not clear the screen."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
