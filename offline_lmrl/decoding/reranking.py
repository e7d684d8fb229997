"""Best-of-n with a scorer over any policy, abstention, and rejection sampling, which gives training data.

Nakano et al. 2021 (WebGPT) take the best of n samples by a reward model. Menick et al. 2022 (GopherCite) give no
answer if even the best sample scores below a threshold, the same for all questions; and they draw the candidates from
different documents in turn. For policies whose replies can be enumerated, ops/preferences.py computes the distribution
of the best of n and its KL divergence (`best_of_n`, `best_of_n_kl` and its bound log n − (n − 1)/n).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from offline_lmrl.errors import InputError
from offline_lmrl.logs.preferences import score_rows
from offline_lmrl.logs.protocols import Policy, Reply, Scorer, Session, optional
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context
from offline_lmrl.ops.preferences import abstention_threshold

CANDIDATE_STRIDE = 2**48  # between the seeds of one reply's candidates: larger than any seed of `generate_texts`


class BestOfN:
    """A policy that draws n replies from another one and returns the best by a scorer; implements Policy.

    Of equal scores, the first reply is returned. The reply's labels hold `score` (the best score, in the scorer's
    unit), `n`, and `abstained` (True if the reply is the abstention).

    It works with any policy: cloned, guided, or conditioned on returns. A turn costs n times that policy's tokens, and
    n scores. A reply's log_prob is its log-probability under that policy, not the log-probability of being chosen.

    Args:
      policy: draws the n replies, the candidates.
      scorer: scores the candidates.
      n: number of candidates per turn, at least 1.
      threshold: if the best score is below this, the reply is `abstention`; None = always answer.
      abstention: the text of the reply in that case.
      contexts: maps a history to 1 to n other histories, such as one for each document to answer from; candidates 0,
        1, ... are drawn from them in turn. None = all are drawn from the history itself. In any case the scorer sees
        the history itself, and a rollout stores it, although log_prob is that in the context the reply was drawn from.

    Raises: InputError if n is below 1.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer,
        n: int,
        threshold: float | None = None,
        abstention: str = "I don't know.",
        contexts: Callable[[Sequence[Turn]], Sequence[Sequence[Turn]]] | None = None,
    ):
        if n < 1:
            raise InputError(f"n: found {n}, expected at least 1")
        self.policy, self.scorer, self.n = policy, scorer, n
        self.threshold, self.abstention, self.contexts = threshold, abstention, contexts

    def read_by(self, history: Sequence[Turn]) -> list[Sequence[Turn]]:
        """Return the history that each of the n candidates is drawn from, in turn (round robin).

        Raises: InputError if `contexts` gives no history or more than n.
        """
        contexts = [history] if self.contexts is None else list(self.contexts(history))
        if not 1 <= len(contexts) <= self.n:
            raise InputError(f"contexts: found {len(contexts)}, expected 1 to n ({self.n}), so that each gets a reply")
        return [contexts[j % len(contexts)] for j in range(self.n)]

    def start(self, seeds: Sequence[int]) -> "BestOfNSession":
        """Start a session, which plays one dialogue (row) per seed.

        Candidate 0 is the reply that the policy alone would give with this seed, if `contexts` is None.
        """
        drawn_from = [seed + j * CANDIDATE_STRIDE for seed in seeds for j in range(self.n)]
        return BestOfNSession(self, self.policy.start(drawn_from))


class BestOfNSession:
    """A session that draws n replies per row and returns the one with the highest score; implements Session.

    Row i of it uses the rows i·n to i·n + n − 1 of the policy's session.

    Args:
      reranked: the policy with its settings.
      session: the session of `reranked.policy`, with n rows for each row of this one.
    Attributes:
      fingerprint: identifies the tokenizer that the replies' token_ids belong to; None if the policy has none.
    """

    def __init__(self, reranked: BestOfN, session: Session):
        self.reranked, self.session = reranked, session
        self.fingerprint = optional(session, "fingerprint")
        self.scores: dict[int, list[float]] = {}  # per row, the best candidate's score at each turn
        self.abstained: dict[int, int] = {}

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """Return, for each of these rows, the best of n candidates for the next agent turn, or the abstention.

        Args:
          rows: rows of this session.
          histories: all turns so far of each row.
          options: the only texts allowed for each row's reply; None = any text.
        """
        drawn = self.candidates(rows, histories, options)
        return [self._chosen(row, *found) for row, found in zip(rows, drawn, strict=True)]

    def candidates(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[tuple[list[Reply], np.ndarray]]:
        """Draw and score n replies per row.

        Args:
          rows: rows of this session.
          histories: all turns so far of each row.
          options: the only texts allowed for each row's replies; None = any text.
        Returns: per row, the n replies and their scores, (n,).
        """
        n = self.reranked.n
        texts = None if options is None else [own for own in options for _ in range(n)]
        replies = self.session.reply(
            [row * n + j for row in rows for j in range(n)],
            [read for history in histories for read in self.reranked.read_by(history)],
            texts,
        )
        groups = [replies[i * n : (i + 1) * n] for i in range(len(rows))]
        scored = [
            (as_context(history), [(_turn(reply),) for reply in group])
            for history, group in zip(histories, groups, strict=True)
        ]
        return list(zip(groups, score_rows(scored, self.reranked.scorer), strict=True))

    def _chosen(self, row: int, replies: Sequence[Reply], scores: np.ndarray) -> Reply:
        best = int(scores.argmax())
        self.scores.setdefault(row, []).append(float(scores[best]))
        threshold = self.reranked.threshold
        abstained = threshold is not None and bool(scores[best] < threshold)
        self.abstained[row] = self.abstained.get(row, 0) + abstained
        chosen = Reply(self.reranked.abstention) if abstained else replies[best]
        return replace(chosen, labels={"score": float(scores[best]), "n": len(replies), "abstained": abstained})

    def labels(self, row: int) -> dict[str, Any]:
        """Return the labels that the policy's session has for the row's candidate 0, with `scores` and `abstained`.

        `scores` holds the best score of each turn, and `abstained` is the number of turns with the abstention.
        """
        own = optional(self.session, "labels")(row * self.reranked.n)
        return {**own, "scores": self.scores.get(row, []), "abstained": self.abstained.get(row, 0)}


def calibrated_threshold(
    reranked: BestOfN, histories: Sequence[Sequence[Turn]], coverage: float, seeds: Sequence[int] | None = None
) -> float:
    """Return the threshold of `BestOfN` at which a given share of held-out histories is answered.

    It is the `abstention_threshold` of the best scores of these histories.

    Args:
      reranked: draws and scores the replies.
      histories: the held-out histories, each the turns before a reply.
      coverage: the share to answer, in [0, 1].
      seeds: the random seed of each history; None = 0, 1, ...
    Returns: a threshold in the scorer's unit; infinite if so small a share means that none is answered.
    Raises: InputError if the share is outside [0, 1].
    """
    session = reranked.start(range(len(histories)) if seeds is None else seeds)
    drawn = session.candidates(range(len(histories)), histories)
    try:
        return abstention_threshold(torch.tensor([scores.max() for _, scores in drawn]), coverage)
    except ValueError as error:
        raise InputError(str(error)) from error


def rejection_sample(
    reranked: BestOfN, histories: Sequence[Sequence[Turn]], keep: int = 1, seeds: Sequence[int] | None = None
) -> list[Trajectory]:
    """Return the best `keep` of n replies to each history as trajectories, with scores as rewards: data for cloning.

    Replies of equal text count once, and replies that score below the threshold are dropped, so a history may give
    fewer than `keep` trajectories, or none. Only the reply is trainable. The labels of a trajectory are `seed`, `rank`
    (the reply's place among the different texts, 0 = best), `n`, and `tokenizer`, the fingerprint of the policy's
    tokenizer, if it has one.

    Args:
      reranked: draws and scores the replies.
      histories: per history, the turns before the reply.
      keep: most replies per history, 1 to n.
      seeds: the random seed of each history; None = 0, 1, ...
    Raises: InputError if `keep` is outside 1 to n.
    """
    if not 1 <= keep <= reranked.n:
        raise InputError(f"keep: found {keep}, expected 1 to n ({reranked.n})")
    seeds = range(len(histories)) if seeds is None else seeds
    session = reranked.start(seeds)
    made = []
    drawn = session.candidates(range(len(histories)), histories)
    for history, seed, (replies, scores) in zip(histories, seeds, drawn, strict=True):
        different: dict[str, int] = {}
        for i in np.argsort(-scores, kind="stable"):
            different.setdefault(replies[i].text, int(i))
        for rank, i in enumerate(list(different.values())[:keep]):
            if reranked.threshold is None or scores[i] >= reranked.threshold:
                labels = {"seed": seed, "rank": rank, "n": reranked.n}
                if session.fingerprint is not None:
                    labels["tokenizer"] = session.fingerprint
                turn = replace(_turn(replies[i]), reward=float(scores[i]))
                made.append(Trajectory((*as_context(history), turn), terminated=replies[i].closed, labels=labels))
    return made


def _turn(reply: Reply) -> Turn:
    ids = reply.token_ids
    return Turn("assistant", reply.text, token_ids=ids, behaviour_log_prob=None if ids is None else reply.log_prob)
