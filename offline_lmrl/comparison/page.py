"""The report of results: one page as Markdown and as HTML, its figures, and a manifest of its origin.

Everything is made from the rows of results.jsonl, which is copied into the report; the same rows give the same bytes.
contents.py computes the values that the page shows, and templates/page.j2 holds its text; report.md.j2 and
report.html.j2 define how headings, tables and so on are written in each format.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.contents import page_contents
from offline_lmrl.comparison.figures import INK, PAPER, Drawing, draw
from offline_lmrl.comparison.gather import gather, refuse_mixed
from offline_lmrl.comparison.provenance import manifest
from offline_lmrl.comparison.report import Line, Results, columns_of, markdown
from offline_lmrl.comparison.rows import as_lines, read_results
from offline_lmrl.logs.io import atomic_output
from offline_lmrl.logs.terminal import visible

NO_FIGURES = {
    "All figures": "matplotlib is not installed; run `pip install 'offline_lmrl[plots]'`, then "
    "`offline-lmrl report FOLDER` with the folder of results.jsonl"
}


def write_report(
    folder: str | Path, *more: str | Path, output: Path | None = None, baseline: str | None = None
) -> Path:
    """Write the report of a comparison, or of the results in several folders, from their results.jsonl.

    The report consists of report.md, report.html (with all figures inside), figures/ (SVG and PNG; none without
    matplotlib), manifest.json (config, data hashes, seeds, and the code, machine and command that made the rows) and
    a copy of results.jsonl.

    Args:
      folder: folder of a comparison or of `evaluate play`, or of an existing report, which has a copy of its rows.
      more: further such folders, whose runs are shown beside the others.
      output: folder in which the report is written; None = the subfolder report/ of `folder`, or `folder` itself if
        it is a report.
      baseline: method that differences are taken against; None = that of the (first) comparison.
    Returns: the report's folder.
    Raises: InputError if there is no results.jsonl, or if its rows, or those of an existing report, belong to
      different comparisons, or if rows cannot be compared.
    """
    rows = gather([folder, *more], baseline)
    within = Path(folder) if (Path(folder) / "manifest.json").exists() else Path(folder) / "report"
    report = within if output is None else output
    earlier = report / "results.jsonl"
    if output is None and report != Path(folder) and earlier.exists():
        refuse_mixed([*rows, *read_results(earlier)], Path(folder) / "results.jsonl")
    results = Results(rows)
    try:
        drawings, missing = draw(results)
    except ModuleNotFoundError:
        drawings, missing = [], NO_FIGURES
    files: dict[str, str | bytes] = {"results.jsonl": as_lines(rows).encode()}
    for drawing in drawings:
        files |= {f"figures/{drawing.name}.svg": drawing.svg, f"figures/{drawing.name}.png": drawing.png}
    origin = manifest(results, files["results.jsonl"])
    files["manifest.json"] = json.dumps(origin, indent=1, ensure_ascii=False) + "\n"
    values = page_contents(results, drawings, missing, origin)
    files |= {name: visible(render(name, values)) for name in ("report.md", "report.html")}
    shutil.rmtree(report / "figures", ignore_errors=True)  # figures that these rows no longer give would remain
    for name, content in files.items():
        with atomic_output(report / name) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return report


def render(name: str, values: Mapping[str, Any]) -> str:
    """Return a page in one format: "report.md", or "report.html", which holds its styles and figures and no scripts.

    The value `contents` names the template of what the page shows. All values are escaped for HTML unless a filter
    returns finished text, as those of Markdown do.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["columns"] = columns_of
    for filter_ in (one_line, quoted, markdown_table, code, inline_svg):
        environment.filters[filter_.__name__] = lambda value, finished=filter_: Markup(finished(value))
    css = Markup(resources.files(__package__).joinpath("templates", "report.css").read_text(encoding="utf-8"))
    text = environment.get_template(f"{name}.j2").render(values, css=css)
    if name == "report.html":
        return text
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # macros of several lines leave more blank lines than one


# The filters that return finished Markdown or HTML.


def one_line(text: str) -> str:
    """Escape titles, names and values as one line of Markdown, so that none acts as a tag, a link or a cell's end."""
    return re.sub(r"\||\](?=[(\[:])", r"\\\g<0>", escape(" ".join(text.split()), quote=False))


def quoted(text: str) -> str:
    """Escape the text of a dialogue as one line of Markdown that shows this text literally."""
    return re.sub(r"[][\\`*_~|#$]", r"\\\g<0>", escape(" ".join(text.split()), quote=False))


def markdown_table(lines: Sequence[Line]) -> str:
    return markdown([{one_line(name): one_line(text) for name, text in line.items()} for line in lines])


def code(text: str) -> str:
    """Escape a text for HTML; the parts in backticks become code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def inline_svg(drawing: Drawing) -> str:
    """Return the SVG of a figure as a part of the HTML page, in the page's text colour.

    Ids inside the SVG get the drawing's name as a prefix, because all drawings are in one document.
    """
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(drawing.title)}" ', 1)
