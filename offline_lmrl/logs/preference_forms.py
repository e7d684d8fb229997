"""Read rows of preferences, in several forms, as comparisons. Every repair and every dropped row is counted.

A row is one line of a data file, as a dict. These forms are read:

    context, options, target [, ranking, weight]     the project's own form; context and each option are messages
    prompt, chosen, rejected                         explicit: text or messages on each side
    chosen, rejected                                 implicit: each side is a whole conversation
    prompt, responses, ranks (or rank)               the lowest rank is best, equal ranks tie, null = unranked

A prompt may also be in a column `messages` or ShareGPT's `conversations`, and a side may be one message; `messages`
lists the spellings that are read. All forms may contain `weight, group, source, labels`.
Other columns are kept in `labels`; a column `margin` becomes `labels["strength"]`. Without a group, a row's group is a
hash of its first user turn, ignoring case, punctuation and white space, so that no split separates the branches of one
conversation. If responses are left out, so are their entries in `labels["options"]`.

The context is the turns that all sides share; sides are compared turn by turn, never character by character. Text with
"Human:" and "Assistant:" tags is a transcript: its turns are stripped, consecutive turns of one speaker are merged,
and only the last reply is compared. Other text without a prompt cannot be divided into turns: all of it is the
agent's.

A side is one of the replies or conversations that a row compares. `allow_empty` accepts replies without text.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offline_lmrl.errors import InputError, at, listed, require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import given_fields, labels_of, read_or_drop
from offline_lmrl.logs.messages import DIALOGUES, as_list, read_turns, with_tools
from offline_lmrl.logs.record import Record, drop_if, read_text
from offline_lmrl.logs.trajectory import Turn, as_context, read_labels

# End tokens of common tokenizers. As text at the end of a logged reply they would be trained on, though nobody wrote
# them.
END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<eos>",
    "<end_of_turn>",
)

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TAG = re.compile(r"\n\n(Human|Assistant):")
_OWN = {"context", "options", "target", "ranking"}
_ROW_FIELDS = {"weight", "group", "source", "labels"}
_FORMS = "context, options and target; or prompt, chosen and rejected; or prompt, responses and ranks"


def read_comparison(row: Any, where: str, counts: Counter, allow_empty: bool = False) -> Comparison | None:
    """Read the comparison of one row in any accepted form; return None if the row is dropped.

    Args:
      row: the row, a dict from column names to values.
      where: "file:row", the start of every error message.
      counts: incremented for each repair of a kept row, under "repaired: ...", or once for a dropped row, under
        "dropped: " and the reason.
      allow_empty: keep rows with an empty reply. Rows of the project's own form may have one in any case, so that
        data that this project wrote can be read again; the importers in `data_prep` check these by `require_replies`.

    Raises: InputError for unknown forms and values of the wrong type.
    """

    def read(row: Record) -> Comparison:
        dialogue = next((name for name in DIALOGUES if name in row.present), None)
        if dialogue is not None and "prompt" not in row.present and {"chosen", "rejected"} <= row.present:
            row = Record({**row, "prompt": row[dialogue], dialogue: None}, row.where, row.repairs)
        context, options, fields, used = _parts(row, allow_empty)
        fields = {"group": root_group(context), **given_fields(row, _ROW_FIELDS), **fields}
        context = with_tools(context, row)
        labels = row.others({*used, *_ROW_FIELDS, "tools"})
        if "margin" in labels:
            labels["strength"] = labels.pop("margin")
        with at(row.where):
            labels |= read_labels(fields.pop("labels", None))
            return Comparison(tuple(context), tuple(options), labels=labels, **fields)

    return read_or_drop(read, row, where, counts)


def transcript(text: str, repairs: Counter) -> list[Turn]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." into stripped turns; consecutive turns of one speaker are merged.

    A tag is read as such only after a blank line or at the start; elsewhere it is part of the text.

    Args:
      repairs: incremented for each turn that is merged into the one before it.
    Raises: Drop for text before the first tag.
    """
    head, *pieces = _TAG.split("\n\n" + read_text(text).lstrip())
    drop_if(head.strip(), "text before the first speaker tag")
    turns: list[Turn] = []
    for speaker, spoken in zip(pieces[::2], pieces[1::2], strict=True):
        role, spoken = _SPEAKERS[speaker], spoken.strip()
        if turns and turns[-1].role == role:
            repairs[f"repaired: consecutive {speaker} turns merged"] += 1
            spoken = f"{turns.pop().content}\n\n{spoken}".strip()
        turns.append(Turn(role, spoken))
    return turns


def is_transcript(text: Any) -> bool:
    """True if a value is text that starts with "Human:" and has an "Assistant:" after a blank line."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def root_group(context: Sequence[Turn]) -> str:
    """Return a group for rows of one conversation: a hash of the first user turn; "" if there is no user turn.

    The hash ignores case, punctuation and white space.
    """
    first = next((turn.content for turn in context if turn.role == "user"), None)
    return "" if first is None else hashlib.sha256(normalised(first).encode()).hexdigest()[:16]


def normalised(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces; text without a word is only stripped."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _parts(row: Record, allow_empty: bool) -> tuple[list[Turn], list[list[Turn]], dict[str, Any], set[str]]:
    """Read a row into the parts of a comparison.

    Returns: the context; the options; further fields of `Comparison` by name (target, ranking, labels); and the names
      of the columns that were used.
    """
    if {"context", "options", "target"} <= row.present:
        context = read_turns(row, "context", allow_empty=True)
        sides = _each(row, "options")
        options = [read_turns(sides, name, allow_empty=True) for name in sides]
        return context, options, {name: row[name] for name in ("target", "ranking") if name in row.present}, _OWN
    if {"chosen", "rejected"} <= row.present:
        context, options = _pair(row, allow_empty)
        return context, options, {"target": (1.0, 0.0), "ranking": ((0,), (1,))}, {"prompt", "chosen", "rejected"}
    column = "ranks" if "ranks" in row.present else "rank"
    if {"prompt", "responses", column} <= row.present:
        context, options, ranks, labels = _ranked(row, column, allow_empty)
        levels = sorted(set(ranks))
        ranking = [[i for i, rank in enumerate(ranks) if rank == level] for level in levels]
        target = [(rank == levels[0]) / len(ranking[0]) for rank in ranks]
        fields = {"target": target, "ranking": ranking, "labels": labels}
        return context, options, fields, {"prompt", "responses", column}
    found = listed(sorted(row.present)) or "none"
    raise InputError(f"{row.where}: fields: found {found}, expected {_FORMS}")


def _pair(row: Record, allow_empty: bool) -> tuple[list[Turn], list[list[Turn]]]:
    prompt, sides = row.get("prompt"), {name: row[name] for name in ("chosen", "rejected")}
    if is_transcript(prompt) and all(isinstance(side, str) for side in sides.values()):
        # A prompt that ends in "Assistant:" and its reply are two halves of one transcript.
        sides = {name: side if side.startswith(prompt) else prompt + side for name, side in sides.items()}
        prompt = None
    if prompt is None and all(map(is_transcript, sides.values())):
        context, options = _split([transcript(side, row.repairs) for side in sides.values()], allow_empty)
        drop_if(any(len(option) > 1 for option in options), "the sides differ before the last reply")
        return context, options
    context = [] if prompt is None else read_turns(row, "prompt", "user", context=True)
    row.count(
        "repaired: text without turns read as the agent's reply, without a context",
        prompt is None and any(isinstance(side, str) for side in sides.values()),
    )
    prompt = _repeated(prompt, list(sides.values()))
    record = Record(sides, row.where, row.repairs)
    common, options = _split([read_reply(record, name, context, prompt) for name in sides], allow_empty)
    return [*context, *common], options


def _ranked(
    row: Record, column: str, allow_empty: bool
) -> tuple[list[Turn], list[list[Turn]], list[float], dict[str, Any]]:
    """Return the context, the options, their ranks (lowest = best) and the row's labels.

    Responses without a rank, and repeated ones, are left out, also from `labels["options"]`.

    Args:
      column: the column with the ranks, "ranks" or "rank".
    """
    responses, ranks = _each(row, "responses"), _each(row, column)
    require(
        len(responses) == len(ranks),
        f"{row.where}: {column}: found {len(ranks)} for {len(responses)} responses, expected one for each response",
    )
    context = read_context(row, "prompt")
    prompt = _repeated(row["prompt"], list(responses.values()))
    ranked: dict[tuple, tuple[list[Turn], float, int]] = {}
    for i, (response, rank) in enumerate(zip(responses, ranks, strict=True)):
        if ranks[rank] is None:
            row.count("repaired: response without a rank left out")
            continue
        number, reply = ranks.number(rank), read_reply(responses, response, context, prompt)
        if _is_empty(reply) and not allow_empty:
            row.count("repaired: empty response left out")
            continue
        before = ranked.setdefault(_spoken(reply), (reply, number, i))
        drop_if(before[1] != number, "one text with two ranks")
        row.count("repaired: equal responses of the same rank merged", before[2] != i)
    drop_if(len(ranked) < 2, "fewer than two ranked responses")
    replies, kept_ranks, places = zip(*ranked.values(), strict=True)
    common, options = _split(replies, allow_empty)
    return [*context, *common], options, list(kept_ranks), _labels_at(row, places, len(responses))


def _each(row: Record, name: str) -> Record:
    """Return the items of a list, which may be given as JSON text, as a record; see `Record.each`."""
    return Record({name: as_list(row[name], row.repairs)}, row.where, row.repairs).each(name)


def _repeated(prompt: Any, sides: Sequence) -> Any:
    """Return the prompt if it has to be removed from the start of replies that repeat it, else None.

    If all text replies start with a plain-text prompt, they repeat it. If only some do, it is a coincidence, as in the
    reply "Hello there" to the prompt "Hello". A transcript or a list of messages is removed in any case, because no
    reply starts with one by coincidence.
    """
    texts = [side for side in sides if isinstance(side, str) and side]
    repeats = is_transcript(prompt) or not isinstance(prompt, str) or all(text.startswith(prompt) for text in texts)
    return prompt if repeats else None


def _labels_at(row: Record, places: Sequence[int], size: int) -> dict[str, Any]:
    """Return the row's labels. If `labels["options"]` has one entry per response, only those at `places` are kept.

    Args:
      places: indices of the responses that are used.
      size: the number of responses in the row.
    """
    labels = labels_of(row)
    options = labels.get("options")
    if isinstance(options, list) and len(options) == size:
        labels["options"] = [options[i] for i in places]
    return labels


def read_context(row: Record, field: str) -> list[Turn]:
    """Read the turns of a prompt, none of which is trainable.

    Args:
      field: the field with the prompt: text, a list of messages, or a transcript, which may end with "Assistant:" and
        no text after it.
    """
    if not is_transcript(row[field]):
        return read_turns(row, field, "user", context=True)
    turns = transcript(row[field], row.repairs)
    if turns[-1] == Turn("assistant", ""):
        turns.pop()
    return as_context(turns)


def read_reply(row: Record, field: str, context: list[Turn], prompt: Any) -> list[Turn]:
    """Read the turns of one side, without the context that it may repeat at its start.

    An end token at the end of the last turn is removed too.

    Args:
      field: the field with the side: a text, a message or a list of messages.
      context: the turns of the prompt.
      prompt: the text or messages that `context` was read from; None = replies given as text do not repeat it.
    """
    side, repeats = row[field], False
    if isinstance(side, str):
        text = read_text(side)
        repeats = isinstance(prompt, str) and prompt != "" and text.startswith(prompt)
        text = text[len(prompt) :] if repeats else text
        turns = [Turn("assistant", text.strip() if is_transcript(prompt) else text)]
    else:
        row = Record({field: [side] if isinstance(side, Mapping) else side}, row.where, row.repairs)
        turns = read_turns(row, field, allow_empty=True)
        repeats = bool(context) and _spoken(turns[: len(context)]) == _spoken(context)
        turns = turns[len(context) :] if repeats else turns
    row.count("repaired: prompt removed from the start of a reply", repeats)
    text = turns[-1].content.rstrip() if turns else ""
    if text.endswith(END_TOKENS):
        row.count("repaired: end token removed from a reply")
        end = next(token for token in END_TOKENS if text.endswith(token))
        turns[-1] = replace(turns[-1], content=text.removesuffix(end))
    return turns


def _split(sides: Sequence[list[Turn]], allow_empty: bool) -> tuple[list[Turn], list[list[Turn]]]:
    """Split sides into the turns that are equal at the start of all of them, and the remaining turns of each side.

    Returns: the shared turns, as context, and one list of turns per side.
    Raises: Drop if the remaining turns cannot be compared.
    """
    spoken, common = [_spoken(side) for side in sides], 0
    while all(len(side) > common and side[common] == spoken[0][common] for side in spoken):
        common += 1
    options = [side[common:] for side in sides]
    drop_if(any(options) and not all(options), "one side continues where the other ends")
    require_replies(options, allow_empty)
    drop_if(not all(option[0].is_trainable for option in options), "the sides differ before the agent's reply")
    drop_if(not all(option[-1].is_trainable for option in options), "a side that does not end with the agent")
    return [replace(turn, trainable=False) if turn.is_trainable else turn for turn in sides[0][:common]], options


def require_replies(options: Sequence[Sequence[Turn]], allow_empty: bool) -> None:
    """Check that no two options are equal up to white space and that none is empty.

    Args:
      options: the turns of each option.
      allow_empty: True: accept empty options.

    Raises: Drop if two options are equal or one is empty.
    """
    words = [[[text.split() for text in turn.spoken] for turn in option] for option in options]
    drop_if(any(words.count(option) > 1 for option in words), "identical replies")
    drop_if(not allow_empty and any(map(_is_empty, options)), "empty reply")


def _spoken(turns: Sequence[Turn]) -> tuple[tuple[str, ...], ...]:
    return tuple(turn.spoken for turn in turns)


def _is_empty(reply: Sequence[Turn]) -> bool:
    return not any(turn.content.strip() or turn.tool_calls for turn in reply)
