"""The console script `offline-lmrl`. It runs the named command and turns errors into one line and an exit code.

Exit codes: 0 done, 1 the program or a part of it failed (with a traceback), 2 an input or a setting cannot be used,
130 interrupted, 143 terminated.
Commands are imported when they are called, so that the help is printed at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

from offline_lmrl.algorithms import ALGORITHMS
from offline_lmrl.errors import Failed, InputError, Stopped, shown
from offline_lmrl.logs.terminal import visible


class Entry(NamedTuple):
    """A command.

    target: module of this folder and name of its function, which is imported when it is called.
    summary: a line for the help.
    positional: the settings that are given without a name, if the function takes settings; None = it takes the words.
    """

    target: str
    summary: str
    positional: tuple[str, ...] | None = None


COMMANDS = {
    "prepare": Entry("data:prepare", "convert logs of a known source to trajectories or comparisons"),
    "check": Entry("data:check", "report the contents of a data set and faults that make learning fail", ("data",)),
    "train": Entry("train:train", f"train one algorithm on logs or by play: {', '.join(ALGORITHMS)}"),
    "evaluate": Entry("evaluate:evaluate", "measure a run or a scorer: play, logs, scorer"),
    "generate": Entry("play:generate", "reply to prompts with a trained run; --chat for a dialogue", ("run",)),
    "export": Entry("export:export", "write a run in a form that other engines play, after playing both", ("run",)),
    "serve": Entry("serve:serve", "serve a run over HTTP with the routes of OpenAI's API", ("run",)),
    "compare": Entry("train:compare", "train and evaluate methods over several seeds; write a report"),
    "report": Entry("train:report", "draw the runs of one or several folders in one report", ("folders",)),
    "plot": Entry("train:plot", "draw the losses and other metrics of one or several runs", ("runs",)),
    "relabel": Entry("score:relabel", "score logs with a reward model, rules, or a mix of scorers", ("data",)),
    "select": Entry("score:select", "write the pairs on which an ensemble disagrees most, to label next", ("data",)),
    "config": Entry("data:config", "list the shipped configs or print one", ("name",)),
}

HELP = "\n".join(
    [
        "usage: offline-lmrl COMMAND [FILE.yaml] [--key value ...]",
        "",
        "Offline reinforcement learning for language models: train on logs, then generate text guided by values.",
        "",
        *(f"  {name:<10} {entry.summary}" for name, entry in COMMANDS.items()),
        "",
        "`offline-lmrl COMMAND --help` lists the settings of a command. The command line overrides the file.",
        "A setting of the form package.module:name, also in a YAML file, imports that module, so its code runs.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
      argv: the command line without the program's name; None = that of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from offline_lmrl import __version__

        print(f"offline-lmrl {__version__}")
        return 0
    if not sys.stderr.isatty():
        # In a log file the progress bars of downloads and weight loading would bury the output.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _require_text(arguments)
        with _ended_by_sigterm():
            _run(arguments[0], arguments[1:])
    except InputError as error:
        return _refuse(str(error))
    except Failed as error:
        _refuse(str(error))
        return 1
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe: without this the interpreter fails when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # about a file of the user, or from a library about a missing model or data set
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _refuse(str(InputError(message)))
    except Stopped as stop:
        print(stop.line or "terminated", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Context manager: make SIGTERM raise Stopped, so that the command cleans up before it ends, as after SIGINT."""

    def stop(number: int, frame: object) -> None:
        raise Stopped("", number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_text(arguments: Sequence[str]) -> None:
    """Check at the start, not only when a config or report is saved, that all arguments can be written to a text file.

    Raises: InputError for an argument with a NUL character or text that is not UTF-8.
    """
    for argument in arguments:
        if "\0" in argument or argument.encode(errors="replace").decode() != argument:
            raise InputError(f"found {shown(argument)}, expected text in UTF-8 without NUL characters")


def _run(name: str, argv: Sequence[str]) -> None:
    if name not in COMMANDS:
        from offline_lmrl.settings import nearest

        raise InputError(
            f"found command {shown(name)}, expected one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}"
        )
    module, _, function = COMMANDS[name].target.partition(":")
    command = vars(import_module(f"offline_lmrl.cli.{module}"))[function]
    if COMMANDS[name].positional is not None:
        from offline_lmrl.cli.parser import ready

        ready(name, command, argv, COMMANDS[name].positional)()
    else:
        command(argv)


def _refuse(message: str) -> int:
    print(f"error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return 2
