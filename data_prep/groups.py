"""Join groups of rows about the same prompt, for sources that give each prompt an id."""

from collections.abc import Mapping
from dataclasses import replace

from offline_lmrl.logs.io import Row
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory


def join_groups(made: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows with new groups: two rows get the same group if they have the same id or first user turn.

    If rows A and B have the same id, and B and C the same first user turn (`root_group`), all three get one group. The
    id alone misses prompts that were posted twice; the words alone miss prompts that were edited.

    Args:
      made: rows by split; the group of a row is the source's id so far.
    """
    parents: dict[tuple[bool, str], tuple[bool, str]] = {}

    def find(key: tuple[bool, str]) -> tuple[bool, str]:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]  # union-find with path halving
            key = parents[key]
        return key

    def links(row: Row) -> list[tuple[bool, str]]:
        root = root_group(row.turns if isinstance(row, Trajectory) else row.context)
        return [(is_id, name) for is_id, name in ((False, root), (True, row.group)) if name]

    for rows in made.values():
        for row in rows:
            roots = [find(key) for key in links(row)]
            for root in roots:
                parents[root] = min(roots)  # independent of the order of rows; words come before ids
    return {
        name: [replace(row, group=find(links(row)[0])[1]) if links(row) else row for row in rows]
        for name, rows in made.items()
    }
