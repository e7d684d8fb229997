"""The page of an evaluation on held-out logs: what each β or requested return does to replies, with a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.figures import COLOURS, STYLE, Drawing, files_of, new_axes
from offline_lmrl.comparison.page import NO_FIGURES, render
from offline_lmrl.evaluation.choice_text import LEGEND, as_json, choice_cells, side_by_side
from offline_lmrl.evaluation.choices import Choice, ChoiceTable
from offline_lmrl.evaluation.offline_report import OfflineReport
from offline_lmrl.logs.io import write_text
from offline_lmrl.logs.terminal import visible

TITLE = "Expected gain against text quality"


def write_choices(report: OfflineReport, output: Path, origin: Mapping[str, Any]) -> Path:
    """Write an evaluation on held-out logs as JSON, and as one HTML page that needs no other file.

    Args:
      report: the evaluation.
      output: a file name that ends in .json, beside which the page is written; or a folder for choices.json and
        choices.html.
      origin: name -> value of what was evaluated, such as the run and the data, as values that JSON can hold.
    Returns: the page's path.
    """
    file = output if output.suffix == ".json" else output / "choices.json"
    write_text(file, json.dumps({**origin, **as_json(report)}, indent=1, ensure_ascii=False) + "\n")
    page = file.with_suffix(".html")
    write_text(page, visible(render("report.html", choice_contents(report, origin))))
    return page


def choice_contents(report: OfflineReport, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that templates/choices.j2 shows, by the names that it uses.

    Arguments as for `write_choices`.
    """
    table, glance = report.choices, [f"{name}: {value}" for name, value in origin.items()]
    glance += [f"{report.trajectories} trajectories, {report.agent_tokens} agent tokens"]
    glance += [f"log π per agent token (nats): {report.log_prob}", *report.closing_lines()]
    values = {"contents": "choices.j2", "title": "Evaluation on held-out logs", "glance": glance, "drawing": None}
    values |= {"choices": [], "legend": LEGEND, "replies": []}
    if table is not None:
        values["choices"] = [choice_cells(as_json(row), row.choice == report.chosen) for row in table.rows]
        values["replies"] = [
            {"": str(number), "prompt": prompt, **replies}
            for number, (prompt, replies) in enumerate(side_by_side(table, report.chosen), start=1)
        ]
        try:
            values["drawing"] = draw_choices(table, report.chosen)
        except ModuleNotFoundError:
            values["legend"] = [*LEGEND, f"{TITLE}: {NO_FIGURES['All figures']}"]
    values["agreement"] = [
        {
            "": name,
            "rank correlation": found.correlation.to_text(2),
            "AUC": found.auc.to_text(2),
            "n": str(found.auc.n),
        }
        for name, found in report.agreement.items()
        if found is not None
    ]
    values["calibration"] = [
        {"Q": f"{row['q']:.3f}", "realised return": f"{row['return_to_go']:.3f}", "n": str(row["n"])}
        for row in report.calibration or ()
    ]
    return values


def draw_choices(table: ChoiceTable, chosen: Choice | None) -> Drawing | None:
    """Draw expected gain against the share of whole replies, one marker per choice; None without estimated gains.

    Args:
      table: the table.
      chosen: the choice with a ring around its marker; None = none.
    Raises: ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    if table.held_out is None:
        return None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        figure, axes = new_axes(xlabel="replies that are not broken, %", ylabel="expected gain over β 0")
        axes.axhline(0.0, color="#8a9199", linestyle=":", linewidth=1.2)
        axes.margins(x=0.1)
        for colour, asked in zip(COLOURS, (False, True), strict=False):
            rows = [row for row in table.rows if (row.choice.ask is not None) == asked]
            places = [(100 * (1 - row.broken), row.advantage.mean) for row in rows]
            axes.plot([x for x, _ in places], [y for _, y in places], color=colour, marker="o", linewidth=0.9)
            for number, (row, (x, y)) in enumerate(zip(rows, places, strict=True)):
                axes.vlines(x, row.advantage.low, row.advantage.high, color=colour, linewidth=1.2, alpha=0.4)
                if row.choice == chosen:
                    axes.plot(x, y, marker="o", markersize=12, markerfacecolor="none", color=colour)
                # Neighbours are often close together, so their names are on different sides of their markers.
                offset = ((7, -3), (-24, -12), (-24, 5), (6, 6))[number % 4]
                axes.annotate(str(row.choice), (x, y), xytext=offset, textcoords="offset points", fontsize=8)
        svg, png = files_of(figure)
    caption = (
        "Gain: the expected return of the replies minus that of the replies of β 0 to the same prompts, by a "
        "regression fitted on these logs alone, with its 95% interval. A reply is broken if it is empty, unlikely, "
        "repeated or unfinished. Up and to the right is better; the line joins the βs in order, and the ring marks "
        "what was chosen."
    )
    return Drawing("choices", TITLE, caption, svg, png)
