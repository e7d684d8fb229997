"""The forms in which a run leaves this project, one class per form, in FORMS.

A new form is one module with a class that follows `ExportForm`, and one line in FORMS. `export_run` (export/run.py)
does what all forms share: it plays run and export beside each other, and prints and stores the result.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError, shown
from offline_lmrl.export.beside import LOG_PROB, Player, Row
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.settings import build, nearest

FEWEST = 20  # prompts from which an interval is believed


@dataclass(frozen=True)
class Request:
    """What is to be exported, as far as it is known before a model is loaded.

    run: the run directory.
    output: the folder that will hold the export.
    saved: the run metadata: the settings saved with the model.
    decoding: the decoding settings to reproduce.
    changes: fields of DecodingConfig that the caller gave over those saved with the run.
    prompts: the dialogues that run and export reply to.
    device: device for the models; None = the first accelerator, else the CPU.
    force: True: an export that misses a bound, or cannot be played here, is written too.
    """

    run: Path
    output: Path
    saved: Mapping[str, Any]
    decoding: DecodingConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[Sequence[Turn]] = ()
    device: Any = None
    force: bool = False


@dataclass(frozen=True)
class Written:
    """What a form says of the export that it wrote.

    lines: what the export plays and how exact it is, one fact per line; printed, and in the card.
    card: the card (README.md) in Markdown, as lines; the comparison with the run is added.
    rows: measures with bounds that the form made itself while it wrote.
    usage: how to play the export, such as a command; printed last.
    bounded: replaces `ExportForm.bounded` where the bounds depend on how the export was written.
    """

    lines: Sequence[str]
    card: Sequence[str]
    rows: Sequence[Row] = ()
    usage: Sequence[str] = ()
    bounded: Callable[[Row], Row | None] | None = None


class ExportForm(Protocol):
    """A form of export; its settings are the fields of its dataclass."""

    def check(self, request: Request) -> None:
        """Check, from the run's settings only, that this form can hold the run.

        Raises: InputError that names the setting and what would do.
        """

    def greedy(self, decoding: DecodingConfig) -> DecodingConfig:
        """Return the run's settings whose replies equal the greedy replies of the export."""

    def write(self, policy: LanguagePolicy, request: Request, folder: Path) -> Written:
        """Write the export.

        Args:
          policy: the run, under no requested return. Its model may be changed: it is loaded anew afterwards.
          request: what is exported.
          folder: a folder to create and fill; it becomes `request.output` once the export has been played.
        """

    def player(self, policy: LanguagePolicy, request: Request, folder: Path) -> AbstractContextManager[Player | None]:
        """Return a context manager that loads the export and plays it; None where `force` allows that it cannot.

        Args:
          policy: the run; only its renderer and its ids of returns are needed.
          request: what is exported.
          folder: the export.
        """

    def bounded(self, row: Row) -> Row | None:
        """Return a measure of the comparison with what this form expects of it, or as it is; None = leave it out."""


FORMS = {
    "plain": "offline_lmrl.export.plain:Plain",
    "transformers": "offline_lmrl.export.transformers:Transformers",
    "vllm": "offline_lmrl.export.vllm:VLLM",
}


def make_form(to: str, settings: Mapping[str, Any] | None = None) -> ExportForm:
    """Return the form of this name.

    Args:
      to: a key of FORMS.
      settings: fields of its class.
    Raises: InputError for an unknown name or setting.
    """
    if to not in FORMS:
        raise InputError(f"to: found {shown(to)}, expected one of {', '.join(FORMS)}{nearest(to, FORMS)}")
    module, _, name = FORMS[to].partition(":")
    return build(vars(importlib.import_module(module))[name], settings or {}, "form")


def samples_alike(row: Row) -> Row:
    """Add to the log-probability of sampled replies the bound of a form that samples from the run's distribution.

    The difference has to be within twice its 95 % interval of 0, which chance exceeds once in 2,000 exports or less
    often. A few prompts say too little of the interval, so they have no bound.
    """
    if row.name != LOG_PROB or row.n < FEWEST:
        return row
    mean, low, high = row.difference
    return replace(row, bound="difference within twice its interval of 0", met=abs(mean) <= high - low)


def formula(decoding: DecodingConfig) -> str:
    """Return the distribution that these settings play, without its temperature, in one line."""
    guidance, filters = "", ["support", "top_k", "top_p", "min_p"]
    if decoding.beta != 0:
        advantage = "Q" if decoding.clip is None else f"min(Q − V, {decoding.clip:g})"
        guidance = f" + {decoding.beta:g} · {advantage} ({decoding.q_reduce} of the Q heads)"
        filters.insert(1, "candidates")
    left = [f"{name} {value:g}" for name in filters if (value := getattr(decoding, name))]
    return f"log π{guidance}" + (f" on the tokens that {', '.join(left)} leave" if left else "")
