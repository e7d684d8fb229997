"""Export a run in one of the forms of export/forms.py, after it has been played beside the run.

The export is written to a temporary folder and played there on held-out prompts, as is the run. It gets its final name
only if every bound of its form is met. Beside the files of the form, the folder then holds README.md, the model card
with the comparison, and export.json with the same numbers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError, shown
from offline_lmrl.export.beside import Beside, RunPlayer, Trial, play
from offline_lmrl.export.forms import ExportForm, Request, Written, make_form
from offline_lmrl.export.prompts import HeldOut, encode_prompts, find_prompts
from offline_lmrl.logs.io import atomic_output
from offline_lmrl.models.adapters import saved_run_metadata


@dataclass(frozen=True)
class Export:
    """A written export; `str` describes it.

    folder: its folder.
    decoding: the decoding settings that it reproduces.
    written: what its form says of it.
    beside: the comparison with the run.
    """

    folder: Path
    decoding: DecodingConfig
    written: Written
    beside: Beside

    def __str__(self) -> str:
        return "\n".join([*self.written.lines, "", str(self.beside), *self.written.usage])


def export_run(
    run: str | Path,
    output: str | Path,
    to: str | ExportForm = "plain",
    *,
    held_out: HeldOut | None = None,
    force: bool = False,
    device: str | torch.device | None = None,
    **changes: Any,
) -> Export:
    """Write a run in a form that plays without this project, after playing it beside the run.

    Args:
      run: a run directory.
      output: folder to write, which must not exist yet.
      to: the form: a key of FORMS, or an object of one of its classes, with other settings.
      held_out: what run and export reply to; None = its defaults.
      force: write an export too that misses a bound, that too few prompts judge, or that cannot be played here.
      device: device for the models; None = the first accelerator, else the CPU.
      changes: DecodingConfig fields that replace those saved with the run.
    Raises: InputError if `run` is not a run of a policy, `output` exists, the form cannot hold the run, there are no
      prompts, or a bound is missed or cannot be told; nothing is written then.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"output: found {output}, which exists already, expected a new folder")
    form = make_form(to) if isinstance(to, str) else to
    saved = saved_run_metadata(run)
    decoding = DecodingConfig.from_dict({**(saved.get("decoding") or {}), **changes})
    request = Request(Path(run), output, saved, decoding, changes, device=device, force=force)
    _check_run(request)
    form.check(request)
    held_out = held_out or HeldOut()
    prompts = find_prompts(run, held_out)
    request = replace(request, prompts=prompts.histories)

    def load() -> LanguagePolicy:
        # The ask is part of the request: one by name might need a task or another run, so it is removed here.
        policy = LanguagePolicy.load(run, device=device, **{**changes, "ask": None})
        policy.model.eval()
        return policy

    policy, greedy = load(), form.greedy(decoding)
    ids = encode_prompts(policy, prompts.histories, decoding.ask)
    of_run = play(RunPlayer(policy), ids, greedy, decoding)
    with atomic_output(output) as temporary:
        written = form.write(policy, request, temporary)
        with form.player(policy, request, temporary) as player:
            of_export = player and play(player, ids, greedy, decoding)
        del policy  # the form may have changed it
        trial = Trial(load(), prompts, ids, greedy, decoding, held_out.scorer)
        bounded = written.bounded or form.bounded
        beside = trial.compare(of_run, of_export, bounded) if of_export else Beside.unplayed()
        beside = beside.plus(written.rows)
        _require_bounds(beside, force)
        _write_card(temporary, written, beside, decoding)
    return Export(output, decoding, written, beside)


def _check_run(request: Request) -> None:
    """Check that there is a run of a policy, which has what guidance and a requested return need."""
    algorithm = request.saved.get("algorithm")
    if algorithm in (None, "reward_model"):
        found = "a model that no run of this project wrote" if algorithm is None else "a reward model"
        raise InputError(f"run: found {found} in {request.run}, expected the run of a policy")
    if (ask := request.changes.get("ask")) is not None and "returns" not in request.saved:
        raise InputError(f"ask: found {shown(ask)}, expected none: this model was not trained with returns")
    if request.decoding.beta != 0 and request.saved.get("value_heads") is None:
        raise InputError(f"beta: found {request.decoding.beta:g}, expected 0: this run has no value heads")


def _require_bounds(beside: Beside, force: bool) -> None:
    if beside.unmet and not force:
        found = "; ".join(f"{row.found}, expected {row.bound}" for row in beside.unmet)
        undecided = any(row.met is None for row in beside.unmet)
        remedy = "give more prompts (--prompts FILE, --n NUMBER); " if undecided else ""
        raise InputError(f"export: found {found}: nothing is written; {remedy}--force writes it all the same")


def _write_card(folder: Path, written: Written, beside: Beside, decoding: DecodingConfig) -> None:
    wrong = "It was not played" if beside.prompts == 0 else None
    if beside.unmet:
        missed = any(row.met is False for row in beside.unmet)
        wrong = "It misses a bound" if missed else "Too few prompts tell whether it meets its bounds"
    warning = [f"**{wrong}, and was written by force.**", ""] if wrong else []
    card = [*written.card, "", "## Beside the run", "", *warning, *beside.markdown()]
    (folder / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")
    numbers = {"decoding": decoding.to_dict(), "lines": list(written.lines), **beside.to_dict()}
    (folder / "export.json").write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
