"""Text of logs, models and files on its way to a terminal."""

import re

# Control characters but line feed and tab, those that turn the direction of what follows, line separators that are no
# line feeds, and halves of surrogate pairs, which cannot be printed.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with control characters spelt as JSON spells them: `\u001b[2J` instead of a cleared screen."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
