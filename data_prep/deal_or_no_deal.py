"""Convert Deal or no deal (Lewis et al. 2017; facebookresearch/end-to-end-negotiator) to scored trajectories.

Both public line forms are read: the plain one of data.txt and the tagged one of train.txt, val.txt and test.txt. A
line is a dialogue as one side saw it. It becomes that side's episode in the form of
`offline_lmrl.tasks.negotiation`: the side's values, the dialogue, "divide", and the items that the side takes,
with the reward on that last turn.

A selection is the division of the items that a side chose at the end. How the logs are read:
- The reward is the value of the items that the side took if both selections add up to the pool, and otherwise 0,
  whatever the line's `reward=` is.
- A disconnect is a cut before the division: the episode ends with "divide" and is not terminated.
- The tagged form replaces selections that do not fit by `<disagree>`. The division is then unknown, but its reward is
  known to be 0: the episode ends with the dialogue, and the reward 0 is on the side's last turn.
- The partner's values and selection are labels and never in a turn.
- The scenario (counts and both sides' values, in either order) is the group, so that both sides of a dialogue and all
  dialogues over one scenario stay together.
- Books, hats and balls are only names: a dialogue stays valid if they are exchanged consistently in values, words and
  division. `permute_items` adds the exchanged versions to the training split.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.source import FileSource, Report, write_trajectories
from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.record import Drop, drop_if
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.settings import setting
from offline_lmrl.tasks.negotiation import (
    DIVIDE,
    ITEMS,
    SELECTION,
    Scenario,
    Triple,
    division_text,
    fits,
    scenario_entry,
    scenario_turn,
    worth,
)

# If several files of a split exist, the first is read: data.txt and train.txt are the same dialogues.
FILES = {"train": ("data.txt", "train.txt"), "validation": ("val.txt",), "test": ("test.txt",)}

_HELD_OUT = 200  # scenarios, of nearly 1,900 in the public file

_NUMBER = "[0-9]{1,9}"
_SIX = rf"{_NUMBER}(?: {_NUMBER}){{5}}"
_PLAIN = re.compile(
    rf"(?P<own>{_SIX}) (?P<talk>.+ {SELECTION}) (?P<selection>.+) <eos> "
    rf"reward=(?P<reward>.+) (?P<flag>agree|disagree) (?P<partner>{_SIX})"
)
_TAGGED = re.compile(
    rf"<input> (?P<own>{_SIX}) </input> <dialogue> (?P<talk>.+ {SELECTION}) </dialogue> "
    rf"<output> (?P<selection>.+) </output> <partner_input> (?P<partner>{_SIX}) </partner_input>"
)
_TURN = re.compile(r"(YOU|THEM): (\S.*)")
_ITEM = re.compile(rf"item[0-5]=({_NUMBER})")
_ITEM_NAME = re.compile(r"\b(book|hat|ball)(?=s?\b)")
# Text that replaces a division, in both forms -> outcome
_OUTCOMES = {
    "no agreement": "no agreement",
    "<no_agreement>": "no agreement",
    "disconnect": "disconnect",
    "<disconnect>": "disconnect",
    "<disagree>": "division not logged",
}


@dataclass(frozen=True)
class Side:
    """One line of a file: a negotiation as one of its two sides saw it.

    Attributes:
      scenario: `scenario.values` holds this side's values first, then the partner's.
      talk: the turns, each as (YOU or THEM, text); YOU is this side.
      outcome: "agreement", "selections do not fit", "no agreement", "division not logged" or "disconnect".
      division: the number of items of each kind that this side took; None if there is none or it was not logged.
      labels: the partner's values, and what the line says of selection and reward, for the trajectory's labels.
    """

    scenario: Scenario
    talk: tuple[tuple[str, str], ...]  # (YOU or THEM, words), the selection last
    outcome: str
    division: Triple | None  # None if the outcome has none, or it was not logged
    labels: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DealOrNoDeal(FileSource):
    """Read the public files and write <split>.jsonl, scenarios_<split>.json for playing, and report.json.

    data.txt (or train.txt) becomes train and tune, val.txt validation, and test.txt test; a single file with another
    name is read as data.txt. All dialogues of a scenario that is in tune, validation or test are removed from train.
    The report holds counts per file (lines = kept + the drops by reason) and per split.
    """

    held_out_scenarios: int | None = setting(
        None,
        "number of scenarios of data.txt that go to tune, for choosing settings; null = 200, or a fifth of them in a "
        "small file",
    )
    permute_items: bool = setting(
        False,
        "add to train every dialogue with its items in every other order, in the group of the dialogue; a version "
        "whose scenario is in tune, validation or test is left out",
    )

    def make(self) -> Report:
        """Read the files, and write the splits and their scenarios."""
        files = _files(Path(self.input))
        report: dict[str, Any] = {"files": {}}
        sides = {}
        for split, path in files.items():
            sides[split], report["files"][path.name] = read_log(path)
        splits = {split: [to_trajectory(side, files[split].name) for side in sides[split]] for split in sides}
        if "train" in splits:
            self._divide(splits, sides["train"], files["train"], report)
        report["splits"] = {split: _summary(rows) for split, rows in splits.items()}
        scenarios = {
            f"scenarios_{split}.json": [
                scenario_entry(scenario)
                for scenario in sorted({_scenario_of(row) for row in rows}, key=lambda scenario: scenario.key)
            ]
            for split, rows in splits.items()
        }
        return write_trajectories(self.output, splits, report, scenarios)

    def _divide(
        self, splits: dict[str, list[Trajectory]], logged: Sequence[Side], path: Path, report: dict[str, Any]
    ) -> None:
        """Divide the train split into train and tune, without the scenarios of other splits.

        Args:
          splits: the trajectories by split.
          logged: the lines of the train split.
          path: their file.
          report: the report, to which counts are added.
        """
        rows = splits.pop("train")
        elsewhere = {row.group for split in splits.values() for row in split}
        unseen = [row for row in rows if row.group not in elsewhere]
        report["removed_from_train_scenario_in_validation_or_test"] = len(rows) - len(unseen)
        tune_groups = _held_out(unseen, self.held_out_scenarios, self.seed, path)
        splits["train"] = [row for row in unseen if row.group not in tune_groups]
        if tune_groups:
            splits["tune"] = [row for row in unseen if row.group in tune_groups]
        if self.permute_items:
            held_out = elsewhere | tune_groups
            kept = [side for side in logged if side.scenario.key not in held_out]
            versions = [(side, version) for side in kept for version in permutations(side)]
            new = [(side, version) for side, version in versions if version.scenario.key not in held_out]
            report["item_permutations"] = {"added": len(new), "left_out": len(versions) - len(new)}
            splits["train"] += [
                replace(to_trajectory(version, path.name), group=side.scenario.key) for side, version in new
            ]


def read_log(path: Path) -> tuple[list[Side], dict[str, Any]]:
    """Read one file; return a `Side` for each line that is kept, and counts for the report.

    The counts add up: lines = kept + Σ dropped. The counts of repairs and outcomes are about kept lines only.

    Raises: InputError if the file cannot be read or has no line of either form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file of negotiations") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 ({error.reason}), expected text") from error
    sides, dropped, repaired, outcomes = [], Counter(), Counter(), Counter()
    for line in lines:
        repairs: Counter[str] = Counter()
        try:
            side = parse_line(line.strip(), repairs)
        except Drop as reason:
            dropped[str(reason)] += 1
            continue
        sides.append(side)
        outcomes[side.outcome] += 1
        repaired += repairs
    if not sides:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "the file is empty"
        raise InputError(f"{path}: found no usable line ({reasons}), expected one of the two public forms")
    return sides, {
        "lines": len(lines),
        "kept": len(sides),
        "dropped": dict(dropped),
        "repaired": dict(repaired),
        "outcomes": dict(outcomes),
    }


def parse_line(line: str, repairs: Counter[str]) -> Side:
    """Read a line of the plain or the tagged form.

    Args:
      repairs: incremented, under the reason, if the logged reward is not used as it is.
    Raises: Drop if the line cannot be used.
    """
    drop_if(not line, "blank line")
    match = _TAGGED.fullmatch(line) or _PLAIN.fullmatch(line)
    drop_if(match is None, "a line in neither of the two forms")
    own, partner = ([int(number) for number in match[name].split()] for name in ("own", "partner"))
    drop_if(own[::2] != partner[::2], "the two sides have different counts")
    scenario = Scenario(tuple(own[::2]), (tuple(own[1::2]), tuple(partner[1::2])))
    logged = match.groupdict()  # only the plain form has reward and flag
    side = _with_outcome(
        Side(
            scenario,
            _talk(match["talk"]),
            "",
            None,
            {
                "partner_values": list(scenario.values[1]),
                "logged_selection": match["selection"],
                "logged_reward": logged.get("reward"),
                "logged_flag": logged.get("flag"),
            },
        ),
        repairs,
    )
    drop_if(
        not any(speaker == "YOU" for speaker, _ in side.talk)
        and side.outcome in ("division not logged", "disconnect"),
        "this side has neither a turn nor a division",
    )
    return side


def to_trajectory(side: Side, source: str) -> Trajectory:
    """Return the negotiation as an episode of this side, with the reward on this side's last turn.

    Args:
      source: name of the file, stored in the trajectory.
    """
    turns = [scenario_turn(side.scenario.counts, side.scenario.values[0])]
    turns += [Turn("assistant" if speaker == "YOU" else "user", words) for speaker, words in side.talk]
    if side.outcome == "division not logged":
        last = max(place for place, turn in enumerate(turns) if turn.is_trainable)
        turns[last] = replace(turns[last], reward=0.0)
    else:
        turns.append(DIVIDE)
    if side.outcome in ("agreement", "selections do not fit", "no agreement"):
        reward = worth(side.division, side.scenario.values[0]) if side.outcome == "agreement" else 0
        turns.append(Turn("assistant", division_text(side.division), reward=reward))
    return Trajectory(
        tuple(turns),
        terminated=side.outcome != "disconnect",
        group=side.scenario.key,
        task="deal-or-no-deal",
        source=source,
        labels={**side.labels, "outcome": side.outcome, "agreement": side.outcome == "agreement"},
    )


def permutations(side: Side) -> list[Side]:
    """Return the dialogue with books, hats and balls exchanged in each of the five other orders.

    The labels of the logged selection are not changed. If two orders give the same result, because no word, count or
    value distinguishes two items, it is returned once.
    """
    versions = {}
    for order in itertools.permutations(range(len(ITEMS))):

        def moved(triple: Triple, order: tuple[int, ...] = order) -> Triple:
            return tuple(triple[item] for item in order)  # item k moves to index order.index(k)

        def renamed(match: re.Match[str], order: tuple[int, ...] = order) -> str:
            return ITEMS[order.index(ITEMS.index(match[0] + "s"))].removesuffix("s")

        scenario = Scenario(moved(side.scenario.counts), tuple(map(moved, side.scenario.values)))
        talk = tuple((speaker, _ITEM_NAME.sub(renamed, words)) for speaker, words in side.talk)
        version = replace(
            side,
            scenario=scenario,
            talk=talk,
            division=side.division and moved(side.division),
            labels={**side.labels, "partner_values": list(scenario.values[1])},
        )
        versions.setdefault((scenario, talk, version.division), version)
    return list(versions.values())[1:]  # the first order is the logged one


def _talk(text: str) -> tuple[tuple[str, str], ...]:
    turns = [_TURN.fullmatch(turn) for turn in text.split(" <eos> ")]
    drop_if(not all(turns), "a turn without speaker or words")
    talk = tuple((turn[1], turn[2]) for turn in turns)
    drop_if(
        [words == SELECTION for _, words in talk] != [False] * (len(talk) - 1) + [True],
        "the selection is not the last turn",
    )
    return talk


def _with_outcome(side: Side, repairs: Counter[str]) -> Side:
    """Return the side with its outcome and division, as read from the logged selection in its labels.

    In the plain form, the selection is this side's division, and a flag is `agree` if the partner's division fits. In
    the tagged form, the selection is both divisions.

    Raises: Drop if the selection cannot be read.
    """
    selection, reward, flag = (side.labels[name] for name in ("logged_selection", "logged_reward", "logged_flag"))
    words = selection.split(" ")
    if not all(_ITEM.fullmatch(word) for word in words):
        outcome = _OUTCOMES.get(selection) or (_OUTCOMES.get(words[0]) if words == words[:1] * 6 else None)
        drop_if(outcome is None, "a selection that is neither a division nor a known word")
        if outcome == "division not logged":
            repairs["division not logged: reward 0 on the last turn of this side"] += 1
        return replace(side, outcome=outcome)
    numbers = [int(_ITEM.fullmatch(word)[1]) for word in words]
    drop_if(len(numbers) != (6 if flag is None else 3), "a selection with the wrong number of items")
    division, counts = tuple(numbers[:3]), side.scenario.counts
    possible = all(number <= count for number, count in zip(division, counts, strict=True))
    agreed = possible and (fits(counts, division, tuple(numbers[3:])) if flag is None else flag == "agree")
    if flag is not None and reward != str(worth(division, side.scenario.values[0])):
        repairs["logged reward is not the value of the selection: value used"] += 1
    if not agreed and reward != "0":
        repairs["selections do not fit: reward 0"] += 1
    return replace(side, outcome="agreement" if agreed else "selections do not fit", division=division)


def _files(source: Path) -> dict[str, Path]:
    """Return {split: file} for a folder with any of the public files, or for one file."""
    if source.is_dir():
        found = {
            split: [source / name for name in names if (source / name).is_file()] for split, names in FILES.items()
        }
        files = {split: paths[0] for split, paths in found.items() if paths}
        if not files:
            expected = ", ".join(name for names in FILES.values() for name in names)
            raise InputError(f"{source}: found none of the public files, expected any of {expected}")
        return files
    return {next((split for split, names in FILES.items() if source.name in names), "train"): source}


def _held_out(rows: Sequence[Trajectory], number: int | None, seed: int, path: Path) -> set[str]:
    """Draw the groups that are held out from training, by hash, so that they do not depend on the order of the lines.

    Args:
      rows: the trajectories to draw from.
      number: number of groups; None = 200, or a fifth of the groups if that is less.
      path: the file of the rows, for error messages.
    Raises: InputError if no group would be left.
    """
    groups = sorted({row.group for row in rows}, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    if number is None:
        number = min(_HELD_OUT, len(groups) // 5)
    require(
        0 <= number < len(groups),
        f"held_out_scenarios: found {number}, expected 0 to {max(len(groups) - 1, 0)}, "
        f"so that at least one scenario of {path.name} is left for train",
    )
    return set(groups[:number])


def _scenario_of(row: Trajectory) -> Scenario:
    counts, *values = (tuple(int(number) for number in part.split()) for part in row.group.split(" / "))
    return Scenario(counts, (values[0], values[1]))


def _summary(rows: Sequence[Trajectory]) -> dict[str, Any]:
    finished = [row for row in rows if row.terminated]
    return {
        "rows": len(rows),
        "scenarios": len({row.group for row in rows}),
        "mean_return": round(sum(row.total_return for row in finished) / max(len(finished), 1), 4),
        "agreement": round(sum(row.labels["outcome"] == "agreement" for row in finished) / max(len(finished), 1), 4),
    }
