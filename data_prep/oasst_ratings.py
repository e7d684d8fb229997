"""Convert OpenAssistant conversation trees (Köpf et al. 2023) to scored replies, each rated by itself.

Messages are read and left out as in `data_prep.oasst`. Every rated reply of the assistant becomes a trajectory. The
messages from the root to the reply are context, which is not trained on. The reply earns
- "quality": the mean quality that its reviewers gave it, in [0, 1], or
- "thumbs": (up − down) / (up + down) of its thumbs, in [−1, 1].
A reply without a rating is not a bad reply; it is left out and counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data_prep import trajectories
from data_prep.oasst import Message, Reply, import_replies, turns_of
from offline_lmrl.errors import InputError
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory, as_context


def prepare(
    input: str | Path,
    output: str | Path,
    *,
    reward: Literal["quality", "thumbs"] = "quality",
    languages: list[str] | None = None,
    validation: float = 0.1,
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read messages, threads or trees and write train.jsonl, validation.jsonl and report.json.

    Args:
      input: a .jsonl, .jsonl.gz or .parquet file, a folder of such files or a hub name.
      output: folder to write to; created if needed.
      reward: the reward of a reply: quality (its mean rating, in [0, 1]) or thumbs ((up − down) / (up + down)).
      languages: tags of the languages whose messages are kept, such as en or pt-BR; null = all.
      validation: share of the groups (first messages) that goes to validation if the source has no validation split.
      group: column of a reply, or of its tree, by which rows are kept together in one split; null = the first message.
      seed: random seed of the split.
    Returns: the content of report.json. Its `assembled` counts every message once.
    Raises: InputError if nothing can be read, nothing is left or the output cannot be written.
    """
    replies, report = import_replies(input, languages, group)
    counts = Counter(report["assembled"])
    made = {split: list(rate(some, reward, counts)) for split, some in replies.items()}
    if not any(made.values()):
        raise InputError(f"{input}: found no reply with {reward} ({dict(counts)}), expected one or more")
    return trajectories.publish(made, output, {**report, "assembled": dict(+counts)}, validation, seed)


def rate(replies: Iterable[Reply], reward: Literal["quality", "thumbs"], counts: Counter[str]) -> Iterator[Trajectory]:
    """Yield a trajectory of each rated reply.

    Args:
      reward: "quality" or "thumbs", as the module describes.
      counts: incremented for each reply, as scored or as without rating.
    """
    for before, reply in replies:
        score = _quality(reply) if reward == "quality" else _thumbs(reply)
        if score is None:
            counts[f"replies without {reward}"] += 1
            continue
        counts["replies scored"] += 1
        context = turns_of(before)
        turns = (*as_context(context), replace(reply.turn, reward=score))
        group = reply.group or root_group(context) or reply.id
        yield Trajectory(turns, group=group, source="oasst", labels=reply.labels)


def _quality(reply: Message) -> float | None:
    return reply.labels["labels"].get("quality")


def _thumbs(reply: Message) -> float | None:
    up, down = (reply.labels["emojis"].get(name, 0) for name in ("+1", "-1"))
    return (up - down) / (up + down) if up + down else None
