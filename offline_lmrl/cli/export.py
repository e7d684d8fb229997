"""The command `export`: a run in a form that plays without this project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from offline_lmrl.cli.output import check_output
from offline_lmrl.errors import InputError
from offline_lmrl.settings import REQUIRED, setting


@dataclass(kw_only=True)
class ExportConfig:
    """Write a run in a form that plays without this project, after playing it beside the run.

    Run and export reply to the same held-out prompts. Nothing is written if the export misses a bound of
    its form, or if the prompts are too few to tell.
    """

    run: str = setting(REQUIRED, "Run directory.")
    output: Path = setting(REQUIRED, "Folder to write, which must not exist yet.")
    to: Literal["plain", "transformers", "vllm"] = setting(
        "plain",
        "Form of the export. plain: weights of the base model, for any engine; guidance is folded into them where "
        "that is exact, else distilled; transformers: base weights, heads, and a `custom_generate` that decodes as "
        "the run does; vllm: the run with its values, for vLLM with this package as a plugin.",
    )
    form: dict[str, Any] = setting(dict, "Settings of the form, such as --form.NAME VALUE.")
    prompts: str | None = setting(
        None,
        "File of prompts, as for `generate`; null = the validation data in the run's config, else its training data.",
    )
    n: int = setting(50, "Largest number of prompts.")
    scorer: str | None = setting(None, "Scorer that rewards the replies, as in `relabel`; null = no rewards.")
    force: bool = setting(
        False, "Write an export too that misses a bound, that too few prompts judge, or that cannot be played here."
    )
    device: str | None = setting(
        None, "Device of the model, such as cpu or cuda:0; null = the first accelerator, else the CPU."
    )
    decoding: dict[str, Any] = setting(dict, "DecodingConfig fields, over those saved with the run.")

    def __post_init__(self) -> None:
        from offline_lmrl.decoding.config import DecodingConfig

        DecodingConfig(**self.decoding)  # reports a number out of range before the model is loaded
        if self.n < 2:
            raise InputError(f"n: found {self.n}, expected at least 2 prompts")


def export(config: ExportConfig) -> None:
    """Write an export; print what it plays, the comparison with the run, and how to play it."""
    from offline_lmrl.export.forms import make_form
    from offline_lmrl.export.prompts import HeldOut
    from offline_lmrl.export.run import export_run
    from offline_lmrl.logs.files import sweep

    output = config.output
    check_output(output, config.run, config.prompts)
    if output.parent.is_dir():
        sweep(output.parent, output.name)  # first, so that leftovers of a killed export go even if this one is refused
    report = export_run(
        config.run,
        output,
        make_form(config.to, config.form),
        held_out=HeldOut(config.prompts, config.scorer, config.n),
        force=config.force,
        device=config.device,
        **config.decoding,
    )
    print(report)
    print(output)
