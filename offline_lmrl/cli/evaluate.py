"""The command `evaluate`; measures.py has what it measures, which takes seconds to import."""

from collections.abc import Sequence

from offline_lmrl.renamed import evaluate_commands

HELP = """usage: offline-lmrl evaluate play|logs|scorer ...

  evaluate play RUN --environment NAME    play a run in an environment, or on prompts with a scorer
  evaluate logs RUN --data HELDOUT        measure a run on held-out logs; --show ROW prints one token by token
  evaluate scorer SCORER --data HELDOUT   measure how often a reward model or another scorer agrees with comparisons

`offline-lmrl evaluate play --help` lists the settings of `evaluate play`, and so on."""


def evaluate(argv: Sequence[str]) -> None:
    """Run the command `evaluate play|logs|scorer`; `evaluate RUN` of version 0.1 is one or two of these.

    Args:
      argv: the command line after `evaluate`.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return
    from offline_lmrl.cli import measures
    from offline_lmrl.cli.parser import command_of, decoding_flags
    from offline_lmrl.logs.io import holds_comparisons

    known = {
        "play": (measures.PlayConfig, measures.evaluate_play),
        "logs": (measures.LogsConfig, measures.evaluate_logs),
        "scorer": (measures.ScorerConfig, measures.evaluate_scorer),
    }
    runs = []
    for part, *words in [argv] if argv[0] in known else evaluate_commands(argv, holds_comparisons):
        config, measure = known[part]
        subject, flags = ("scorer", {}) if part == "scorer" else ("run", decoding_flags())
        command = command_of(f"evaluate {part}", config, positional=(subject,), decoding=flags)
        runs.append((measure, config(**command.read(words))))
    for measure, config in runs:  # after all settings have been checked
        measure(config)
