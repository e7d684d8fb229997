"""Convert OpenAssistant conversation trees (Köpf et al. 2023) to comparisons of the replies to one message.

The three export forms are read, with rows in any order: messages with `message_id` and `parent_id` (also as Parquet
from the hub), threads, and whole trees. How they are read:
- Replies of the assistant to one message that people ranked are one comparison; rank 0 is best. The messages from the
  root to that message are its context.
- Messages are left out if they were deleted, failed their review, are in a tree that is not ready, are in another
  language than requested, or have no text. All replies to such a message are left out too, since their context is
  unknown.
- A tree is one group, together with all trees whose first message has the same words.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import fields
from data_prep.comparisons import import_rows, publish, read_raw
from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.forms import extra_columns
from offline_lmrl.logs.preference_forms import read_comparison
from offline_lmrl.logs.trajectory import Turn, messages_of, shown

_ROLES = {"prompter": "user", "assistant": "assistant"}
_KEPT = {
    "message_id",
    "user_id",
    "created_date",
    "lang",
    "rank",
    "review_count",
    "synthetic",
    "model_name",
    "detoxify",
}


class Message(NamedTuple):
    """One message of a conversation tree.

    Attributes:
      id: the message's id.
      parent: the id of the message that it replies to; None for the first message of a tree.
      rank: the rank among the replies to the same message, 0 = best; None = not ranked.
      labels: facts by name, among them `labels` (mean ratings by reviewers: quality, toxicity, ...) and `emojis`
        (number of thumbs and others), each a mapping.
      unusable: the reason why the message is left out; "" = it is used.
      group: the group if the user named a column for it, else "".
    """

    id: str
    parent: str | None
    turn: Turn
    rank: float | None
    labels: Mapping[str, Any]
    unusable: str
    group: str = ""


class Thread(NamedTuple):
    """A turn and the turns before it, as a linked list: replies share it, so memory holds each turn of a tree once."""

    turn: Turn
    before: "Thread | None"


Reply = tuple[Thread | None, Message]  # the turns before a reply, and the reply


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    languages: list[str] | None = None,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read messages, threads or trees and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files or a hub name.
      output: folder to write to; created if needed.
      languages: tags of the languages whose messages are kept, such as en or pt-BR; null = all.
      validation: share of the groups (first messages) that goes to validation if the source has no validation split.
      group: column of a reply, or of its tree, by which rows are kept together in one split; null = the first message.
      seed: random seed of the split.
    Returns: the content of report.json. Its `assembled` counts every message once.
    Raises: InputError if nothing can be read, nothing is left or the output cannot be written.
    """
    replies, report = import_replies(input, languages, group)
    counts = Counter(report["assembled"])
    made = {split: list(compare(some, counts)) for split, some in replies.items()}
    if not any(made.values()):
        raise InputError(f"{input}: found no ranked replies to one message ({dict(counts)}), expected two or more")
    return publish(made, output, {**report, "assembled": dict(+counts)}, validation, seed)


def import_replies(
    source: str | Path, languages: Collection[str] | None, group: str | None = None
) -> tuple[dict[str, list[Reply]], dict[str, Any]]:
    """Read the assistant's replies with the turns before them.

    Args:
      source: file, folder or hub name.
      languages: keep only messages in these languages, such as en; None = all.
      group: column of a reply or of its tree that holds the group; None = no group.
    Returns: the replies by split of the source, and the entries with which the report begins. The entry `assembled`
      counts all messages that are not such replies, by reason.
    """

    def read(row: Mapping, where: str, counts: Counter[str]) -> list[Message]:
        found = [
            _message(record, parent, row.get("tree_state"), here, languages, counts)
            for here, record, parent in _records(row, where)
        ]
        if group is None:
            return found
        groups = [
            fields.group(record if record.get(group) is not None else row, group, here)
            for here, record, _ in _records(row, where)
        ]
        return [message._replace(group=name) for message, name in zip(found, groups, strict=True)]

    made, report = import_rows(source, read)
    counts: Counter[str] = Counter()
    replies = {split: list(connect(chain.from_iterable(rows), counts)) for split, rows in made.items()}
    return replies, {**report, "assembled": dict(+counts)}


def connect(messages: Iterable[Message], counts: Counter[str]) -> Iterator[Reply]:
    """Yield the assistant's replies for which all messages before them are known, each message before its replies.

    Args:
      messages: in any order.
      counts: incremented for each message that is not yielded, under the reason.
    """
    known: dict[str, Message] = {}
    for message in messages:
        if known.setdefault(message.id, message) is not message:
            counts["messages left out: repeated"] += 1
    children: dict[str | None, list[Message]] = defaultdict(list)
    for message in known.values():
        if message.unusable:
            counts[f"messages left out: {message.unusable}"] += 1
        else:
            children[message.parent].append(message)
    reached: list[Reply] = [(None, root) for root in children[None]]
    for before, message in reached:  # the loop appends to the list: breadth-first search
        thread = Thread(message.turn, before)
        reached += [(thread, reply) for reply in children.get(message.id, ())]
        if message.turn.role == "user":
            counts["messages of prompters"] += 1
        else:
            yield before, message
    counts["messages left out: the message that they reply to is missing or left out"] += sum(
        map(len, children.values())
    ) - len(reached)


def turns_of(thread: Thread | None) -> list[Turn]:
    """Return the turns of a thread, first to last."""
    turns = []
    while thread is not None:
        turns.append(thread.turn)
        thread = thread.before
    return turns[::-1]


def compare(replies: Iterable[Reply], counts: Counter[str]) -> Iterator[Comparison]:
    """Yield, for each message with at least two ranked replies, one comparison of these.

    Args:
      counts: incremented for each reply (compared or not), and for each repaired or dropped set of replies.
    """
    siblings: dict[str, list[Reply]] = defaultdict(list)
    for before, reply in replies:
        siblings[reply.parent or f"root {reply.id}"].append((before, reply))
    for together in siblings.values():
        messages = [message for _, message in together]
        mine: Counter[str] = Counter()
        # Most replies are the only one to their message; their context is not needed.
        compared = sum(message.rank is not None for message in messages) > 1
        made = read_raw(
            {
                "prompt": messages_of(turns_of(together[0][0] if compared else None)),
                "responses": [message.turn.content for message in messages],
                "ranks": [message.rank for message in messages],
                "source": "oasst",
                "group": messages[0].group or None,
                "labels": {"options": [message.labels for message in messages]},
            },
            messages[0].id,
            read_comparison,
            mine,
        )
        counts["replies compared"] += len(made.options) if made else 0
        counts["replies not compared"] += len(messages) - (len(made.options) if made else 0)
        counts.update({f"sets of replies {name}": n for name, n in mine.items() if name not in ("rows", "imported")})
        if made:
            yield made


def _records(row: Mapping, where: str) -> Iterator[tuple[str, Mapping, Any]]:
    """Yield (start of error messages, message, id of the message that it replies to) for each message of a row."""
    if row.get("message_id") is not None:
        yield where, row, row.get("parent_id")
    elif row.get("thread") is not None:
        parent = None
        for i, record in enumerate(fields.objects(row, "thread", where)):
            yield f"{where}: thread[{i}]", record, parent
            parent = record.get("message_id")
    elif row.get("prompt") is not None:
        found = [(f"{where}: prompt", fields.inner(row, "prompt", where), None)]
        for here, record, parent in found:  # the loop appends to the list: breadth-first search
            yield here, record, parent
            replies = fields.objects(record, "replies", here) if record.get("replies") is not None else ()
            found += [(f"{where}: replies[{i}]", reply, record.get("message_id")) for i, reply in enumerate(replies)]
    else:
        raise InputError(f"{where}: fields: found {shown(list(row))}, expected message_id, thread or prompt")


def _message(
    record: Mapping, parent: Any, state: Any, where: str, languages: Collection[str] | None, counts: Counter[str]
) -> Message:
    role, rank = record.get("role"), record.get("rank")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: role: found {shown(role)}, expected prompter or assistant")
    if not isinstance(parent, str | None):
        raise InputError(f"{where}: parent_id: found {shown(parent)}, expected text or null")
    for name in ("deleted", "review_result"):
        if not isinstance(record.get(name), bool | None):
            raise InputError(f"{where}: {name}: found {shown(record[name])}, expected true, false or null")
    words = fields.text(record, "text", where)
    labels = extra_columns(record, {name for name in _KEPT if record.get(name) is not None}, counts)
    labels["labels"] = _by_name(record, "labels", "value", where)
    labels["emojis"] = _by_name(record, "emojis", "count", where)
    reasons = {
        "deleted": record.get("deleted"),
        "failed its review": record.get("review_result") is False,
        "its tree is not ready": state not in (None, "ready_for_export"),
        "in another language": languages is not None and record.get("lang") not in languages,
        "no text": not words.strip(),
    }
    return Message(
        fields.text(record, "message_id", where),
        parent,
        Turn(_ROLES[role], words),
        None if rank is None else fields.number(record, "rank", where),
        labels,
        next((reason for reason, holds in reasons.items() if holds), ""),
    )


def _by_name(record: Mapping, field: str, key: str, where: str) -> dict[str, float]:
    """Return the reviewers' labels or the emojis of a message as {name: number}, without nulls.

    Exports hold {name: {value, count}} or {name: count}; the hub holds {name: [...], value: [...], count: [...]}.

    Args:
      record: the message.
      field: "labels" or "emojis".
      key: which number to return, "value" or "count".
      where: the start of error messages.
    """
    if record.get(field) is None:
        return {}
    found = fields.inner(record, field, where)
    here = f"{where}: {field}"
    if isinstance(found.get("name"), Sequence):
        names, values = fields.items(found, "name", here), fields.items(found, key, here)
        if len(names) != len(values):
            raise InputError(f"{here}: {key}: found {len(values)} for {len(names)} names, expected one for each name")
        found = dict(zip(map(str, names), values, strict=True))
    plain = {name: one.get(key) if isinstance(one, Mapping) else one for name, one in found.items()}
    return {name: fields.number({key: value}, key, here) for name, value in plain.items() if value is not None}
