"""Convert comparisons to scored trajectories, and trajectories back to comparisons.

`to_trajectories` makes one scored trajectory of every option (reply); no other code turns preference into reward. A
preference compares two replies to one prompt and contains no information about the prompt. By default, the mean reward
of each group (all rows about one prompt or conversation) is therefore subtracted: otherwise a high return would be a
mark of easy prompts, and a return-conditioned model would learn this. (In ILQL, V absorbs the difficulty of a prompt.)
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.protocols import Scorer, optional
from offline_lmrl.logs.trajectory import Trajectory, Turn, finite, shown

RewardKind = Literal["sign", "prob", "strength", "rank", "bt", "rating"]
Normalise = Literal["none", "global", "group", "rank"]
Scored = tuple[Sequence[Turn], Sequence[Sequence[Turn]]]  # a context and the options that follow it

EMPTY_REPLY = "dropped: empty reply"
NO_STRENGTH = "dropped: no strength in the labels"
NO_RATING = "dropped: an option without a rating in the labels"


def to_trajectories(
    comparisons: Iterable[Comparison],
    reward: RewardKind | Scorer = "sign",
    reward_at: Literal["end", "turn"] = "end",
    normalise: Normalise = "group",
    counts: Counter[str] | None = None,
) -> list[Trajectory]:
    """Make one trajectory per option, with a reward computed from the preference; the context is not trained on.

    For an option of K, let w be the mean of P(the option is better than option j) over the K − 1 other options j
    (`Comparison.preference`).

    Args:
      reward: how the reward is computed. "prob": 2w − 1, in [−1, 1]. "sign": the sign of 2w − 1, so a tie earns 0.
        "strength": `labels["strength"]` times 2w − 1. "rank": the number of options ranked below this one minus the
        number ranked above it, over K − 1, so 1 for the best and −1 for the last. "bt": latent scores of a
        Bradley–Terry model fitted to all comparisons of a group (`fit_scores`). "rating": the option's `rating` in
        `labels["options"]`. A scorer, such as a reward model: its score of the option.
      reward_at: which turns get the reward. "end": the last agent turn of the option. "turn": equal parts on each of
        its agent turns. A turn's reward is paid with its closing token. There is no "token": one label on a reply has
        no information about its tokens, and an equal part on each has the same return. Dense rewards come from a
        reward model.
      normalise: "none". "global": to mean 0 and standard deviation 1 over all options. "group": minus the group's
        mean. "rank": the share of the group's other options that have a lower reward, ties counted half, in [0, 1]
        (1/2 if the group has no other option).
      counts: incremented for each option or comparison that is left out, under a key that gives the reason.

    A trajectory's labels are the comparison's, with this option's entry of `labels["options"]` under `option`. The
    label `preference` is a dict with the option's index (`option`), its `target`, the `weight` of the comparison, and
    how the reward was made: `reward` (kind, or `origin_of` the scorer), `reward_at`, `normalise`, the `raw` reward,
    and, except for "rank", the constants in reward = (raw − `shift`) / `scale`.

    Rewards belong to whole turns. If a dialogue is too long, training leaves out its oldest turns or a whole reply, so
    no reward is ever moved to another turn or reply.

    Raises: InputError for unknown settings, for scores that are not finite, and if no trajectory is left.
    """
    kinds = RewardKind.__args__
    require(
        not isinstance(reward, str) or reward in kinds,
        f"reward: found {shown(reward)}, expected one of {', '.join(kinds)} or a scorer",
    )
    require(
        reward_at in ("end", "turn"),
        f"reward_at: found {shown(reward_at)}, expected end or turn (a label of a whole reply gives no rewards of "
        "its tokens; a reward model with a token head does)",
    )
    require(
        normalise in Normalise.__args__,
        f"normalise: found {shown(normalise)}, expected one of {', '.join(Normalise.__args__)}",
    )
    counts = Counter() if counts is None else counts
    rows = list(comparisons)
    if reward == "strength":
        rows = _known(rows, [row.labels.get("strength") is not None for row in rows], NO_STRENGTH, counts)
    elif reward == "rating":
        rated = [all(option.get("rating") is not None for option in row.labels.get("options", [{}])) for row in rows]
        rows = _known(rows, rated, NO_RATING, counts)
    require(rows, f"comparisons: found none to score ({dict(counts)}), expected at least one")
    raw = _raw_rewards(rows, reward)
    keys = [group_key(row) for row in rows]
    made = _normalised(raw, keys, normalise)
    how = {
        "reward": reward if isinstance(reward, str) else origin_of(reward),
        # As version 0.1 spelt it: labels are part of data_hash, by which a run knows its data.
        "place": {"end": "terminal"}.get(reward_at, reward_at),
        "normalise": normalise,
    }
    trajectories = []
    for row, raws, rewards in zip(rows, raw, made, strict=True):
        for i, (value, constants) in enumerate(rewards):
            if any(turn.is_trainable and not turn.content and not turn.token_ids for turn in row.options[i]):
                counts[EMPTY_REPLY] += 1
                continue
            trajectories.append(_trajectory(row, i, value, reward_at, {**how, "raw": raws[i], **constants}))
    require(
        trajectories,
        f"comparisons: found only empty replies ({counts[EMPTY_REPLY]}), expected at least one reply with text",
    )
    return trajectories


def fit_scores(comparisons: Sequence[Comparison]) -> dict[tuple, float]:
    """Fit Bradley–Terry scores s of the replies in one group.

        maximise  Σ weight · P(i ≻ j) · log σ(s_i − s_j) − ½ Σ s²

    Every pair of a comparison counts with factor 1/(K−1), so that each option of the comparison counts once. The
    standard normal prior keeps the scores of replies that always win finite. It also makes scores sum to 0 over
    replies that are connected by comparisons, directly or through others. Bradley and Terry 1952; the prior is ours.

    Args:
      comparisons: all comparisons of one group.
    Returns: (context, option) -> score, both as tuples of turns.
    """
    places: dict[tuple, int] = {}
    pairs = []
    for row in comparisons:
        here = [places.setdefault((row.context, option), len(places)) for option in row.options]
        share = row.weight / (len(here) - 1)
        pairs += [
            (here[i], here[j], share * row.preference(i, j))
            for i in range(len(here))
            for j in range(len(here))
            if here[i] != here[j]
        ]
    better, worse, wins = (np.array(column) for column in zip(*pairs, strict=True))
    scores, size = np.zeros(len(places)), len(places)
    for _ in range(100):  # Newton's method on a strictly concave function, damped to steps of at most 1
        lost = 1 / (1 + np.exp(scores[better] - scores[worse]))  # the model's probability that `worse` wins
        # The prior ½ Σ s² contributes −scores to the gradient and the identity to the negated Hessian.
        gradient = (np.bincount(better, wins * lost, size) - np.bincount(worse, wins * lost, size)) - scores
        curvature = np.eye(size)
        bend = wins * lost * (1 - lost)
        np.add.at(curvature, (better, better), bend)
        np.add.at(curvature, (worse, worse), bend)
        np.add.at(curvature, (better, worse), -bend)
        np.add.at(curvature, (worse, better), -bend)
        step = np.linalg.solve(curvature, gradient)
        scores += step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-10:
            break
    return dict(zip(places, scores.tolist(), strict=True))


def origin_of(scorer: Scorer) -> Any:
    """Return the scorer's `origin` (the name or specification that it was loaded from), or else its class name."""
    return optional(scorer, "origin") or type(scorer).__name__


def score_rows(rows: Sequence[Scored], scorer: Scorer) -> list[np.ndarray]:
    """Score the options of each row, with many rows at once if the scorer has `score_each`.

    Args:
      rows: pairs of a context and the K alternative replies to it; K may differ between rows.
    Returns: one float64 array (K,) per row.

    Raises: InputError for scores that are not one finite number per option.
    """
    together = optional(scorer, "score_each")
    found = together(rows) if together else [scorer.score(*row) for row in rows]
    scores = [np.asarray(values, dtype=float) for values in found]
    for values, (_, options) in zip(scores, rows, strict=True):
        require(
            values.shape == (len(options),) and np.isfinite(values).all(),
            f"reward: found scores {shown(values.tolist())}, expected a finite number for each of "
            f"{len(options)} options",
        )
    return scores


def to_comparisons(trajectories: Iterable[Trajectory], counts: Counter[str] | None = None) -> list[Comparison]:
    """Combine trajectories that reply to the same context into one comparison of the replies, ranked by return.

    The context of a trajectory is the turns before its first agent turn; the reply is all other turns. Trajectories
    with the same context and the same reply make one option, with their mean return. `labels["options"]` holds
    {"return": the option's mean return}.

    Args:
      counts: incremented for each trajectory that is left out because its context has no other reply.
    """
    returns: dict[tuple[Turn, ...], dict[tuple[Turn, ...], list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    for trajectory in trajectories:
        turns = [replace(turn, reward=None, token_ids=None, behaviour_log_prob=None) for turn in trajectory.turns]
        start = next(i for i, turn in enumerate(turns) if turn.is_trainable)
        returns[tuple(turns[:start])][tuple(turns[start:])].append(trajectory)
    made = []
    for context, options in returns.items():
        rows = [row for same in options.values() for row in same]
        if len(options) < 2:
            if counts is not None:
                counts["dropped: no other reply to the same context"] += len(rows)
            continue
        mean = [math.fsum(row.total_return for row in same) / len(same) for same in options.values()]
        levels = sorted(set(mean), reverse=True)
        ranking = tuple(tuple(i for i, value in enumerate(mean) if value == level) for level in levels)
        target = tuple(float(value == levels[0]) / len(ranking[0]) for value in mean)
        made.append(
            Comparison(
                context,
                tuple(options),
                target,
                ranking,
                group=rows[0].group,
                source=rows[0].source,
                labels={"options": [{"return": value} for value in mean]},
            )
        )
    return made


def binarised(comparisons: Iterable[Comparison], good: str = "good:", bad: str = "bad:") -> Iterator[Comparison]:
    """Make of every pair A ≻ B two comparisons of a reply with itself: good A ≻ bad A, and bad B ≻ good B.

    "good A" is a system turn with the text `good`, followed by reply A. Tied pairs are left out.
    Askell et al. 2021, on binarising ranked data: a reward model that is first trained on such pairs (made of votes,
    for example) needs fewer ranked pairs afterwards.

    Args:
      good: text of the system turn that marks a good reply.
      bad: text of the system turn that marks a bad one.
    """
    for row in comparisons:
        for i, j in combinations(range(len(row.options)), 2):
            if row.preference(i, j) == 0.5:
                continue
            better, worse = (i, j) if row.preference(i, j) > 0.5 else (j, i)
            for option, right, wrong in ((row.options[better], good, bad), (row.options[worse], bad, good)):
                marked = tuple((Turn("system", mark), *option) for mark in (right, wrong))
                yield Comparison(
                    row.context, marked, (1.0, 0.0), weight=row.weight, group=row.group, source=row.source
                )


def _known(rows: Sequence[Comparison], known: Sequence[bool], reason: str, counts: Counter[str]) -> list[Comparison]:
    """Return the rows for which `known` is True, and count the others under `reason`."""
    if not all(known):
        counts[reason] += len(rows) - sum(known)
    return [row for row, is_known in zip(rows, known, strict=True) if is_known]


def _raw_rewards(rows: Sequence[Comparison], reward: RewardKind | Scorer) -> list[list[float]]:
    if reward == "bt":
        groups: dict[str, list[Comparison]] = defaultdict(list)
        for row in rows:
            groups[group_key(row)].append(row)
        latent = {key: fit_scores(group) for key, group in groups.items()}
        return [[latent[group_key(row)][row.context, option] for option in row.options] for row in rows]
    if reward == "rating":
        return [[finite("rating", option["rating"]) for option in row.labels["options"]] for row in rows]
    if isinstance(reward, str):
        return [_reward_of(row, reward) for row in rows]
    return [scores.tolist() for scores in score_rows([(row.context, row.options) for row in rows], reward)]


def _reward_of(row: Comparison, kind: str) -> list[float]:
    size = len(row.options)
    if kind == "rank":
        ranks = row.ranks
        return [
            (sum(other > rank for other in ranks) - sum(other < rank for other in ranks)) / (size - 1)
            for rank in ranks
        ]
    margins = [sum(2 * row.preference(i, j) - 1 for j in range(size) if j != i) / (size - 1) for i in range(size)]
    if kind == "sign":
        return [0.0 if math.isclose(margin, 0, abs_tol=1e-9) else math.copysign(1, margin) for margin in margins]
    return [margin * (float(row.labels["strength"]) if kind == "strength" else 1.0) for margin in margins]


def _normalised(
    raw: Sequence[Sequence[float]], keys: Sequence[str], normalise: Normalise
) -> list[list[tuple[float, Mapping[str, float]]]]:
    """Return, per comparison and option, the normalised reward and the constants {"shift", "scale"} that made it.

    Args:
      raw: raw rewards per comparison and option.
      keys: the group of each comparison.
    """
    keys = ["" if normalise == "global" else key for key in keys]
    groups: dict[str, list[float]] = defaultdict(list)
    for key, values in zip(keys, raw, strict=True):
        groups[key] += values
    if normalise == "rank":
        ordered = {key: np.sort(values) for key, values in groups.items()}
        return [
            [(_share_beaten(value, ordered[key]), {}) for value in values]
            for key, values in zip(keys, raw, strict=True)
        ]
    shifts, scales = defaultdict(float), defaultdict(lambda: 1.0)
    for key, values in groups.items():
        if normalise == "global":
            shifts[key], scales[key] = float(np.mean(values)), float(np.std(values)) or 1.0
        elif normalise == "group":
            shifts[key] = math.fsum(values) / len(values)
    return [
        [((value - shifts[key]) / scales[key], {"shift": shifts[key], "scale": scales[key]}) for value in values]
        for key, values in zip(keys, raw, strict=True)
    ]


def _share_beaten(value: float, ordered: np.ndarray) -> float:
    if len(ordered) == 1:
        return 0.5
    below, upto = (int(np.searchsorted(ordered, value, side)) for side in ("left", "right"))
    return (below + (upto - below - 1) / 2) / (len(ordered) - 1)  # −1: the value does not tie with itself


def _trajectory(row: Comparison, i: int, reward: float, reward_at: str, how: Mapping[str, Any]) -> Trajectory:
    option = list(row.options[i])
    agent = [k for k, turn in enumerate(option) if turn.is_trainable]
    paid = agent if reward_at == "turn" else agent[-1:]
    for k in paid:
        option[k] = replace(option[k], reward=reward / len(paid))
    labels = {name: value for name, value in row.labels.items() if name != "options"}
    if "options" in row.labels:
        labels["option"] = row.labels["options"][i]
    labels["preference"] = {"option": i, "target": row.target[i], "weight": row.weight, **how}
    return Trajectory((*row.context, *option), group=group_key(row), source=row.source, labels=labels)
