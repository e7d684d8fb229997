"""Join the groups of sources that have their own id for each prompt."""

from collections.abc import Mapping
from dataclasses import replace

from offline_lmrl.logs.io import Row
from offline_lmrl.logs.preference_forms import root_group
from offline_lmrl.logs.trajectory import Trajectory


def join_groups(made: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Give one group to all rows linked by the source's id (their group so far) or by their first user turn.

    Links are followed through other rows. The id alone misses prompts that were posted twice; the words alone miss
    prompts that were edited.
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
