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
    if not argv or argv[0] in ("-h", "--help", "--help_all"):
        print(HELP)
        return
    from offline_lmrl.cli import measures
    from offline_lmrl.cli.parser import ready
    from offline_lmrl.logs.io import holds_comparisons

    parts = {
        "play": (measures.evaluate_play, "run"),
        "logs": (measures.evaluate_logs, "run"),
        "scorer": (measures.evaluate_scorer, "scorer"),
    }
    commands = [argv] if argv[0] in parts else evaluate_commands(argv, holds_comparisons)
    # All settings are checked before anything is measured.
    for measure in [ready(f"evaluate {part}", parts[part][0], words, parts[part][1:]) for part, *words in commands]:
        measure()
