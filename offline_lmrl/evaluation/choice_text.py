"""The table of choices (choices.py) as text: its cells, what they mean, and replies of three choices side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from textwrap import wrap
from typing import Any

import numpy as np

from offline_lmrl.evaluation.choices import Choice, ChoiceTable
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.logs.trajectory import Turn

SIDE_BY_SIDE = 3  # prompts whose replies are shown


# Columns of the table: name -> (field of `ChoiceRow`, its format). The second group is about text alone.
GAIN = {
    "realised [95%]": ("realised", "{:+.2f}"),
    "gain [95%]": ("advantage", "{:+.2f}"),
    "KL logged": ("kl_logged", "{:.2f}"),
    "KL own": ("kl_token", "{:.2f}"),
    "KL/reply": ("kl_reply", "{:.1f}"),
    "broken": ("broken", "{:.0%}"),
}
TEXT = {
    "log π": ("log_prob", "{:.2f}"),
    "unlikely": ("unlikely", "{:.0%}"),
    "repeated": ("repeated", "{:.0%}"),
    "unfinished": ("unfinished", "{:.0%}"),
    "empty": ("empty", "{:.0%}"),
    "distinct-1": ("distinct_1", "{:.2f}"),
    "distinct-2": ("distinct_2", "{:.2f}"),
    "tokens": ("tokens", "{:.1f}"),
}


def choice_cells(row: Mapping[str, Any], chosen: bool) -> dict[str, str]:
    """Return the cells of a row in a table of choices: name of the column -> text, "–" for an unknown number.

    Args:
      row: a `ChoiceRow` as `as_json` gives it.
      chosen: True: mark the row as the one that was chosen.
    """
    cells = {"choice": f"{Choice(**row['choice'])}{' (chosen)' * chosen}"}
    for name, (own, form) in (GAIN | TEXT).items():
        value, interval = row[own], None
        if isinstance(value, Mapping):
            value, interval = value["mean"], value["interval"]
        cells[name] = "–" if value is None else form.format(value)
        if "[95%]" in name and interval is not None:
            cells[name] += f" [{', '.join(map(form.format, interval))}]"
    return cells


def aligned(lines: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """Return a table as lines of text: a head, then one line per mapping with these of its cells."""
    width = {name: max(len(name), *(len(line[name]) for line in lines)) for name in names}
    shown = [{name: name for name in names}, *lines]
    return ["  ".join(line[name].ljust(width[name]) for name in names).rstrip() for line in shown]


LEGEND = (
    "realised: what the logs earned more where the choice would have acted alike more often than β 0, in reward units "
    "per log; Q has no part in it, and the choice follows it",
    "gain: expected return of the replies minus that of the replies of β 0 to the same prompts, by a regression that "
    "is fitted on these logs alone, in units of their rewards",
    "KL logged, KL own: KL(choice ‖ π) in nats per token, exact at the logged states, and from the tokens of the "
    "choice's own replies; that of β 0 is the filters' alone. KL/reply: per own reply",
    "log π: of its replies, in nats per token; π is the policy without guidance, requested return and filters",
    "unlikely: replies below the 1% quantile of log π of the replies of β 0. repeated: replies in which four tokens "
    "in a row occur four times. unfinished: replies that reach max_new_tokens. broken: any of these, or empty",
    "distinct-2: different pairs of tokens as a share of all. tokens: mean length",
)


def choice_lines(table: ChoiceTable, chosen: Choice | None) -> list[str]:
    """Return the lines of a text that shows a table of choices, and replies to some prompts side by side.

    Args:
      table: the table.
      chosen: the choice that is marked; None = none.
    """
    cells = [choice_cells(as_json(row), row.choice == chosen) for row in table.rows]
    lines = [f"replies to {len(table.prompts)} prompts of these logs:"]
    for names in (GAIN, TEXT):
        lines += [f"  {line}" for line in aligned(cells, ["choice", *names])]
    for text in LEGEND:
        lines += wrap(text, 112, initial_indent="  ", subsequent_indent="    ")
    if table.held_out is None:
        lines.append("no gain is estimated: the returns in these logs do not differ, or all have one group")
    else:
        lines.append(f"the regression orders {table.fitted} logged replies it was not fitted on: {table.held_out}")
    for prompt, replies in side_by_side(table, chosen):
        lines.append(f"prompt: {_one_line(prompt)}")
        lines += [f"  {name}: {_one_line(text)}" for name, text in replies.items()]
    return lines


def side_by_side(table: ChoiceTable, chosen: Choice | None) -> list[tuple[str, dict[str, str]]]:
    """Return the last turn of some prompts with the replies of three choices to it, drawn with the same seeds.

    The choices are the first, β 0; the one chosen; and the last one of the table.

    Args:
      table: the table.
      chosen: the chosen one; None = none was chosen.
    Returns: per prompt, its text and choice -> reply.
    """
    picked = [row for row in table.rows if row.choice == chosen]
    shown = {str(row.choice): row for row in (table.rows[0], *picked, table.rows[-1])}
    places = range(0, len(table.prompts), -(-len(table.prompts) // SIDE_BY_SIDE))
    return [
        (table.prompts[i][-1].content if table.prompts[i] else "", {name: row.texts[i] for name, row in shown.items()})
        for i in places
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def as_json(value: Any) -> Any:
    """Return nested results as values that JSON can hold.

    An `Estimate` becomes a mapping with `mean`, `interval` and `n`; a number without a value becomes None.
    """
    if isinstance(value, Estimate):
        return {"mean": as_json(value.mean), "interval": value.interval, "n": value.n}
    if isinstance(value, Turn):
        return {"role": value.role, "content": value.content}
    if is_dataclass(value):
        return {one.name: as_json(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
