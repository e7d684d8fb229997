"""The one error for bad input from outside."""


class InputError(ValueError):
    """A file, row, setting or name from outside that cannot be used.

    The message is one line that says where, which field, what was found and what was expected, for example
    `logs.jsonl:7: messages[2].reward: found nan, expected a finite number`. The command line prints it as it is and
    exits with code 2.
    """
