"""Convert OpenAssistant conversation trees (Köpf et al. 2023) to comparisons of replies, or to rated replies.

The three export forms are read, with rows in any order: messages with `message_id` and `parent_id` (also as Parquet
from the hub), threads, and whole trees. How they are read:
- Replies of the assistant to one message that people ranked are one comparison; rank 0 is best. The messages from the
  root to that message are its context.
- Messages are left out if they were deleted, failed their review, are in a tree that is not ready, are in another
  language than requested, or have no text. All replies to such a message are left out too, since their context is
  unknown.
- A tree is one group, together with all trees whose first message has the same words.

`OasstRatings` makes a trajectory of every rated reply of the assistant instead. The messages from the root to the
reply are context, which is not trained on. The reply earns
- "quality": the mean quality that its reviewers gave it, in [0, 1], or
- "thumbs": (up − down) / (up + down) of its thumbs, in [−1, 1].
A reply without a rating is not a bad reply; it is left out and counted.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

from data_prep.comparisons import ComparisonImporter
from data_prep.source import Found, Importer, Report, Splits, count_row
from data_prep.trajectories import TrajectoryImporter
from offline_lmrl.errors import InputError, at, require, shown
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import parsed
from offline_lmrl.logs.preference_forms import read_comparison, root_group
from offline_lmrl.logs.record import Record
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context, finite, messages_of
from offline_lmrl.settings import setting

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


@dataclass(frozen=True)
class Message:
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


@dataclass(frozen=True, kw_only=True)
class MessageImporter(Importer):
    """An importer of the assistant's replies in conversation trees, with the turns before them.

    The entry `assembled` of the report counts every message once.
    """

    languages: list[str] | None = setting(
        None, "tags of the languages whose messages are kept, such as en or pt-BR; null = all"
    )

    def read(self, row: Record) -> list[Message]:
        """Return the messages of one row: a message, a thread or a tree."""
        return [self._message(record, parent, row.get("tree_state")) for record, parent in _records(row)]

    def grouped(self, one: list[Message], row: Record) -> list[Message]:
        """Return the messages with the group that the user's column names, in the message or else in its row."""
        if self.group is None:
            return one
        records = [record for record, _ in _records(row)]
        groups = [
            Record(record if record.get(self.group) is not None else row, record.where, row.repairs).group(self.group)
            for record in records
        ]
        return [replace(message, group=name) for message, name in zip(one, groups, strict=True)]

    def assemble(self, found: Found, report: Report) -> Splits:
        """Connect the messages, and make rows of the replies."""
        counts: Counter[str] = Counter()
        replies = {split: list(connect(chain.from_iterable(rows), counts)) for split, rows in found.items()}
        counts = Counter(dict(+counts))
        made = {split: list(self.rows_of(some, counts)) for split, some in replies.items()}
        require(any(made.values()), f"{self.input}: found {self.expected_replies(counts)}")
        report["assembled"] = dict(+counts)
        return made

    def rows_of(self, replies: Iterable[Reply], counts: Counter[str]) -> Iterator[Any]:
        """Yield the final rows of the replies of one split, and count every reply."""
        raise NotImplementedError

    def expected_replies(self, counts: Counter[str]) -> str:
        """Return the end of the error message, after "found", for messages of which no row can be made."""
        raise NotImplementedError

    def _message(self, record: Record, parent: Any, state: Any) -> Message:
        role, rank = record.get("role"), record.get("rank")
        if not isinstance(role, str) or role not in _ROLES:
            raise record.error("role", "prompter or assistant")
        if not isinstance(parent, str | None):
            raise InputError(f"{record.where}: parent_id: found {shown(parent)}, expected text or null")
        for name in ("deleted", "review_result"):
            if not isinstance(record.get(name), bool | None):
                raise record.error(name, "true, false or null")
        words = record.text("text")
        labels = record.columns(_KEPT & record.present)
        labels["labels"] = _by_name(record, "labels", "value")
        labels["emojis"] = _by_name(record, "emojis", "count")
        reasons = {
            "deleted": record.get("deleted"),
            "failed its review": record.get("review_result") is False,
            "its tree is not ready": state not in (None, "ready_for_export"),
            "in another language": self.languages is not None and record.get("lang") not in self.languages,
            "no text": not words.strip(),
        }
        return Message(
            record.text("message_id"),
            parent,
            Turn(_ROLES[role], words),
            None if rank is None else record.number("rank"),
            labels,
            next((reason for reason, holds in reasons.items() if holds), ""),
        )


@dataclass(frozen=True, kw_only=True)
class Oasst(MessageImporter, ComparisonImporter):
    """Read messages, threads or trees and write train.jsonl, validation.jsonl and report.json.

    The entry `assembled` of the report counts every message once.
    """

    def rows_of(self, replies: Iterable[Reply], counts: Counter[str]) -> Iterator[Comparison]:
        """Yield, for each message with at least two ranked replies, one comparison of these."""
        return compare(replies, counts)

    def expected_replies(self, counts: Counter[str]) -> str:
        """Return the end of the error message for messages without ranked replies."""
        return f"no ranked replies to one message ({dict(counts)}), expected two or more"


@dataclass(frozen=True, kw_only=True)
class OasstRatings(MessageImporter, TrajectoryImporter):
    """Read messages, threads or trees and write train.jsonl, validation.jsonl and report.json.

    The entry `assembled` of the report counts every message once.
    """

    reward: Literal["quality", "thumbs"] = setting(
        "quality", "the reward of a reply: quality (its mean rating, in [0, 1]) or thumbs ((up − down) / (up + down))"
    )

    def rows_of(self, replies: Iterable[Reply], counts: Counter[str]) -> Iterator[Trajectory]:
        """Yield a trajectory of each rated reply."""
        for before, reply in replies:
            score = reply.labels["labels"].get("quality") if self.reward == "quality" else _thumbs(reply)
            if score is None:
                counts[f"replies without {self.reward}"] += 1
                continue
            counts["replies scored"] += 1
            context = turns_of(before)
            turns = (*as_context(context), replace(reply.turn, reward=score))
            group = reply.group or root_group(context) or reply.id
            yield Trajectory(turns, group=group, source="oasst", labels=reply.labels)

    def expected_replies(self, counts: Counter[str]) -> str:
        """Return the end of the error message for messages without rated replies."""
        return f"no reply with {self.reward} ({dict(counts)}), expected one or more"


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
        made = count_row(partial(_comparison, together[0][0], messages), messages[0].id, mine)
        compared = len(made.options) if made else 0
        counts["replies compared"] += compared
        counts["replies not compared"] += len(messages) - compared
        counts.update({f"sets of replies {name}": n for name, n in mine.items() if name not in ("rows", "imported")})
        if made:
            yield made


def _comparison(before: Thread | None, messages: Sequence[Message], repairs: Counter[str]) -> Comparison | None:
    """Return the comparison of the replies to one message.

    Args:
      before: the turns before the replies.
      messages: the replies.
    """
    # Most replies are the only one to their message; their context is not needed.
    compared = sum(message.rank is not None for message in messages) > 1
    parts = {
        "prompt": messages_of(turns_of(before if compared else None)),
        "responses": [message.turn.content for message in messages],
        "ranks": [message.rank for message in messages],
        "source": "oasst",
        "group": messages[0].group or None,
        "labels": {"options": [message.labels for message in messages]},
    }
    return read_comparison(parsed(parts, messages[0].id), messages[0].id, repairs)


def _records(row: Record) -> Iterator[tuple[Record, Any]]:
    """Yield (message, id of the message that it replies to) for each message of a row."""
    if row.get("message_id") is not None:
        yield row, row.get("parent_id")
    elif row.get("thread") is not None:
        parent = None
        for record in row.objects("thread"):
            yield record, parent
            parent = record.get("message_id")
    elif row.get("prompt") is not None:
        found = [(row.inner("prompt"), None)]
        for record, parent in found:  # the loop appends to the list: breadth-first search
            yield record, parent
            replies = record.objects("replies") if record.get("replies") is not None else ()
            found += [
                (Record(reply, f"{row.where}: replies[{i}]", row.repairs), record.get("message_id"))
                for i, reply in enumerate(replies)
            ]
    else:
        raise InputError(f"{row.where}: fields: found {shown(list(row))}, expected message_id, thread or prompt")


def _by_name(record: Record, field: str, key: str) -> dict[str, float]:
    """Return the reviewers' labels or the emojis of a message as {name: number}, without nulls.

    Exports hold {name: {value, count}} or {name: count}; the hub holds {name: [...], value: [...], count: [...]}.

    Args:
      record: the message.
      field: "labels" or "emojis".
      key: which number to return, "value" or "count".
    """
    if record.get(field) is None:
        return {}
    found = record.inner(field)
    pairs = found.items()
    if isinstance(found.get("name"), Sequence):
        names, values = found.items_of("name"), found.items_of(key)
        require(
            len(names) == len(values),
            f"{found.where}: {key}: found {len(values)} for {len(names)} names, expected one for each name",
        )
        pairs = zip(map(str, names), values, strict=True)
    plain = {name: one.get(key) if isinstance(one, Mapping) else one for name, one in pairs}
    with at(found.where):
        return {name: finite(key, value) for name, value in plain.items() if value is not None}


def _thumbs(reply: Message) -> float | None:
    up, down = (reply.labels["emojis"].get(name, 0) for name in ("+1", "-1"))
    return (up - down) / (up + down) if up + down else None
