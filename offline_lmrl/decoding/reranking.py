"""Best-of-n with a scorer over any policy, abstention, and rejection sampling back to training data.

Nakano et al. 2021 (WebGPT): the best of n samples by a reward model. Menick et al. 2022 (GopherCite): no answer where
even the best scores too low, by one threshold for all questions; and candidates that read different documents in turn.
What best-of-n does to a policy that can be
enumerated is in ops/preferences.py (`best_of_n`, `best_of_n_kl` and its bound log n − (n − 1)/n).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.preferences import score_rows
from offline_lmrl.data.protocols import Policy, Reply, Scorer, Session
from offline_lmrl.data.trajectory import Trajectory, Turn, as_context
from offline_lmrl.ops.preferences import abstention_threshold

CANDIDATE_STRIDE = 2**48  # between the seeds of one reply's candidates: more than `generate_texts` asks for


class BestOfN:
    """Draws n replies from a policy and says the one that scores best, the first of equals; implements Policy.

    A reply's labels hold `score`, that of the best candidate in the scorer's unit, `n`, and `abstained`.

    Works over any policy: cloned, guided, conditioned on returns. It costs n times its tokens and n scores per turn. A
    reply's log_prob stays that of the policy it was drawn from, which is not that of being chosen.

    Args:
      policy, scorer: see data/protocols.py.
      n: replies per turn, at least 1.
      threshold: a best score below this is not said but `abstention` is; None = always answer.
      abstention: what is said then.
      contexts: gives, for a history, several that candidates 0, 1, ... are drawn from in turn, such as one for each
        document to answer from; None = the history itself. The scorer reads the history as it is, and so does who
        learns from the reply, whose log_prob is that in the context it was drawn from.
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
        """What each of the n candidates reads, in turn (round robin)."""
        contexts = [history] if self.contexts is None else list(self.contexts(history))
        if not 1 <= len(contexts) <= self.n:
            raise InputError(f"contexts: found {len(contexts)}, expected 1 to n ({self.n}), so that each is read")
        return [contexts[j % len(contexts)] for j in range(self.n)]

    def start(self, seeds: Sequence[int]) -> "BestOfNSession":
        """A session with one row per seed; the first candidate is what the policy would say."""
        drawn_from = [seed + j * CANDIDATE_STRIDE for seed in seeds for j in range(self.n)]
        return BestOfNSession(self, self.policy.start(drawn_from))


class BestOfNSession:
    """Rows of one batch; each is n rows of the policy's session. Implements Session."""

    def __init__(self, reranked: BestOfN, session: Session):
        self.reranked, self.session = reranked, session
        self.fingerprint = getattr(session, "fingerprint", None)
        self.scores: dict[int, list[float]] = {}  # of the best candidate, per turn
        self.abstained: dict[int, int] = {}

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """The best of n next agent turns of each of these rows."""
        drawn = self.candidates(rows, histories, options)
        return [self._chosen(row, *found) for row, found in zip(rows, drawn, strict=True)]

    def candidates(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[tuple[list[Reply], np.ndarray]]:
        """Per row its n replies and their scores (n,)."""
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
        said = Reply(self.reranked.abstention) if abstained else replies[best]
        return replace(said, labels={"score": float(scores[best]), "n": len(replies), "abstained": abstained})

    def labels(self, row: int) -> dict[str, Any]:
        """The policy's own of the row's first sample, with `scores` of what scored best and `abstained`, in turns."""
        own = self.session.labels(row * self.reranked.n) if hasattr(self.session, "labels") else {}
        return {**own, "scores": self.scores.get(row, []), "abstained": self.abstained.get(row, 0)}


def calibrated_threshold(
    reranked: BestOfN, histories: Sequence[Sequence[Turn]], coverage: float, seeds: Sequence[int] | None = None
) -> float:
    """The threshold at which that share of held-out histories is answered (`abstention_threshold`).

    Args:
      coverage: in [0, 1]. seeds: one per history; None numbers them.
    Raises: InputError for a share outside [0, 1].
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
    """The best `keep` of n replies to each history as trajectories, with their scores as rewards: data for cloning.

    Replies of equal text count once, those below the threshold not at all, so a history may give fewer, or none.
    `labels` hold `seed`, `rank` among the n (0 = best), `n`, and, where the policy has a tokenizer, its fingerprint.
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
