"""Planning before every reply: a beam search over dialogues that the model itself imagines (Janner, Li, Levine 2021,
Trajectory Transformer, section 3.2), with utterances instead of actions.

    score of a beam after its k-th utterance = Σ_{i<k} γ^i r_i + γ^k V

A beam is the dialogue so far, continued by imagined turns; an utterance is an imagined turn of the agent. r_i is the
expected reward of utterance i (i = 0, 1, ...), and V the expected return after the k-th utterance. Both come from the
model's return heads (models/return_heads.py). A scorer, if one is given, predicts r_{k−1} + γ V as one number.

Each beam proposes several utterances, drawn from the policy with its own decoding settings (top_p and similar filters
keep them probable, since the score contains no likelihood). Each utterance is scored at its last token, because values
inside a turn cannot be compared. The best beams are kept, and the same model imagines, greedily, the environment's
answer to them. It reads the same ids as in training: the window (the turns visible before the utterance), then the
utterance. After `depth` utterances, the first utterance of the best beam becomes the reply. The next turn plans anew.

The model is always under the null condition (no return is requested), because its heads were trained under it: a
requested return in the context would give away the outcome that they predict.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.config import DecodingConfig, PlannerConfig
from offline_lmrl.decoding.policy import SAMPLE_STRIDE, LanguagePolicy
from offline_lmrl.decoding.sampler import CACHE_BYTES, Sampler
from offline_lmrl.errors import InputError
from offline_lmrl.logs.preferences import Scored, score_rows
from offline_lmrl.logs.protocols import Reply, Scorer
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Turn, as_context
from offline_lmrl.models.adapters import part_of, run_metadata


class Planner:
    """A language model that plans its replies; implements Policy.

    With width and expand 1 there is nothing to choose: the replies are those of the policy under the null condition.

    Args:
      policy: draws the proposals, with its own decoding settings but without its requested return, and imagines the
        environment. For depth above 1 it needs return heads and training on the environment's replies (algorithm:
        return_conditioned with return_weight and environment_weight above 0).
      scorer: predicts, from a beam's last utterance and the turns before it, the utterance's reward plus the return
        after it, in reward units; such as a `ValueModelScorer` or a `FunctionScorer` (decoding/scorers.py). None = the
        model's return heads. The rewards of a beam's earlier utterances always come from the return heads.
      width: number of beams kept after each utterance, at least 1.
      expand: number of utterances that each beam proposes, at least 1.
      depth: number of agent utterances to look ahead, at least 1.

    Raises: InputError if expand is above 1 at temperature 0, where all proposals would be equal, or if return heads
      are needed and the model has none.
    """

    def __init__(
        self, policy: LanguagePolicy, scorer: Scorer | None = None, *, width: int = 16, expand: int = 4, depth: int = 1
    ):
        PlannerConfig(width, expand, depth)  # checks the ranges
        if expand > 1 and policy.decoding.temperature == 0:
            raise InputError(f"temperature: found 0, expected above 0: all {expand} greedy proposals would be equal")
        self.policy, self.scorer, self.decoding = policy, scorer, policy.decoding
        self.width, self.expand, self.depth = width, expand, depth
        needs_heads = scorer is None or depth > 1
        self.heads = part_of(policy.model, "return_heads") if needs_heads else None
        if needs_heads and self.heads is None:
            raise InputError(
                "planner: found a model without return heads, expected one trained with return_weight "
                "above 0; without them, a plan needs a scorer and depth 1"
            )
        saved = run_metadata(policy.model.config)
        self.discount = saved["return_heads"]["discount_per_turn"] if self.heads is not None else 1.0
        self.unit = RewardScale(**saved.get("reward_scale", {})).scale
        self.samplers: dict[str, Sampler] = {}
        self.no_room = False

    def say_no_room(self) -> None:
        """Log a warning, once per planner, that some beams end early because max_length is too small."""
        if not self.no_room:
            self.no_room = True
            logging.getLogger(__name__).warning(
                "planner: some plans end before the environment's next reply, which does not fit: max_length has to "
                "hold the system turns, the agent's turn and a reply of max_new_tokens "
                f"({self.policy.decoding.max_new_tokens})"
            )

    def start(self, seeds: Sequence[int]) -> "PlannerSession":
        """Start a session, which plays one dialogue (row) per seed."""
        return PlannerSession(self, seeds)

    def environment(self, role: str) -> Sampler:
        """Return the sampler that imagines the environment's turns, greedily.

        Args:
          role: the speaker of these turns, such as "user".
        Raises: InputError for the role "tool", or if the chat template has no token that ends a turn of this role.
        """
        if role not in self.samplers:
            if role == "tool":
                raise InputError(
                    "planner: found a dialogue with a tool, expected one in which the environment speaks as the user: "
                    "the replies of a tool are not imagined; set depth to 1"
                )
            policy, closing = self.policy, self.policy.renderer.closing(role)
            if not closing:
                raise InputError(
                    f"planner: found a chat template without a token that ends a {role} turn, expected one, because "
                    "it ends an imagined turn; set depth to 1"
                )
            config = DecodingConfig(temperature=0.0, max_new_tokens=policy.decoding.max_new_tokens)
            self.samplers[role] = Sampler(policy.model, policy.renderer, config, close_id=closing[0])
        return self.samplers[role]


@dataclass
class _Beam:
    """A beam: the turns played so far, followed by imagined turns.

    Args:
      row: the row of the session (the episode in its batch) that is planned for.
      turns: the played and the imagined turns.
      key: key of the beam's cache in the current `CacheMemory`.
      first: the first imagined utterance, which becomes the reply if this beam wins; None before there is one.
      first_key: key of that utterance's cache in the `CacheMemory` that the first search level left.
      paid: Σ γ^i r_i over the imagined utterances, in reward units.
      utterances: number of imagined utterances.
      score: the score defined in the module docstring, in reward units.
      ended: True if the beam cannot grow: the episode probably ended, or max_length leaves no space.
    """

    row: int
    turns: list[Turn]
    key: int
    first: Reply | None = None
    first_key: int = 0
    paid: float = 0.0
    utterances: int = 0
    score: float = 0.0
    ended: bool = False


class PlannerSession:
    """A session that plans every reply of a batch of dialogues, one per row; implements Session.

    Between turns it keeps the caches of the chosen replies.

    Args:
      planner: the planner with its settings.
      seeds: the seed of each row's random numbers.
    Attributes:
      fingerprint: identifies the tokenizer and chat template that the replies' token_ids belong to.
    """

    def __init__(self, planner: Planner, seeds: Sequence[int]):
        self.planner, self.policy, self.seeds = planner, planner.policy, list(seeds)
        self.fingerprint = self.policy.renderer.fingerprint
        self.drawn = [0] * len(self.seeds)
        self.memory = CacheMemory(CACHE_BYTES)
        self.scores: dict[int, list[float]] = {}
        self.planned_tokens = dict.fromkeys(range(len(self.seeds)), 0)

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        """Plan the next agent turn of each of these rows.

        Args:
          rows: rows of the session.
          histories: all turns so far of each row.
          options: the only texts allowed for the reply of each row, not for the utterances imagined after it; None =
            any text.
        Returns: one reply per row.
        """
        beams = [_Beam(row, list(history), row) for row, history in zip(rows, histories, strict=True)]
        beams, memory = self._proposals(beams, self.memory, 0, options)
        first_memory, beams = memory, self._best(beams)
        for level in range(1, self.planner.depth):
            open_beams = [beam for beam in beams if not beam.ended]
            if not open_beams:
                break
            open_beams, memory = self._imagined(open_beams, memory)
            if not open_beams:
                break
            longer, memory = self._proposals(open_beams, memory, level)
            beams = self._best([beam for beam in beams if beam.ended] + longer)
        chosen = {beam.row: beam for beam in reversed(beams)}  # best first, so the last one stored is the best
        self.memory = first_memory.fork({row: chosen[row].first_key for row in rows})
        for row in rows:
            self.drawn[row] += len(chosen[row].first.log_prob)
            self.scores.setdefault(row, []).append(chosen[row].score)
        return [chosen[row].first for row in rows]

    def labels(self, row: int) -> dict[str, Any]:
        """Return facts about a row.

        Returns: `scores`, the score of the chosen beam for each reply of the row; and `planned_tokens`, the number of
          tokens drawn for it, imagined turns included.
        """
        return {"scores": self.scores.get(row, []), "planned_tokens": self.planned_tokens[row]}

    def _best(self, beams: Sequence[_Beam]) -> list[_Beam]:
        """Return the `width` beams with the highest scores of each row, best first."""
        kept: dict[int, list[_Beam]] = {}
        for beam in sorted(beams, key=lambda beam: -beam.score):
            if len(kept.setdefault(beam.row, [])) < self.planner.width:
                kept[beam.row].append(beam)
        return [beam for row in kept.values() for beam in row]

    def _proposals(
        self,
        beams: Sequence[_Beam],
        memory: CacheMemory,
        level: int,
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> tuple[list[_Beam], CacheMemory]:
        """Sample `expand` next utterances for each beam; return a new, scored beam for each different text.

        Args:
          beams: the beams to extend, each by one utterance.
          memory: holds the caches of `beams`.
          level: number of utterances that each beam has already.
          options: for each beam, the only texts allowed as its next utterance; None = any text.
        Returns: the extended beams, and the memory that holds their caches.
        """
        planner, policy, n = self.planner, self.policy, self.planner.expand
        windows = [policy.null_window(beam.turns, policy.decoding.max_new_tokens) for beam in beams]
        memory = memory.fork({i * n + j: beam.key for i, beam in enumerate(beams) for j in range(n)})
        # Every proposal of a row has its own seed: levels are width · n apart, and beams of one level n apart.
        seeds, place = [], dict.fromkeys((beam.row for beam in beams), level * planner.width * n)
        for beam in beams:
            seeds += [self.seeds[beam.row] + (place[beam.row] + j) * SAMPLE_STRIDE for j in range(n)]
            place[beam.row] += n
        replies = policy.sampler.sample(
            [window for window in windows for _ in range(n)],
            seeds,
            [self.drawn[beam.row] for beam in beams for _ in range(n)],
            None if options is None else [texts for texts in options for _ in range(n)],
            memory,
            range(len(beams) * n),
        )
        longer, ends = [], []
        for i, (beam, window) in enumerate(zip(beams, windows, strict=True)):
            different: dict[str, int] = {}
            for key in range(i * n, i * n + n):
                self.planned_tokens[beam.row] += len(replies[key].log_prob)
                different.setdefault(replies[key].text, key)
            for key in different.values():
                reply = replies[key]
                utterance = Turn("assistant", reply.text, token_ids=reply.token_ids)
                first = (beam.first, beam.first_key) if beam.utterances else (reply, key)
                longer.append(
                    replace(beam, turns=[*beam.turns, utterance], key=key, first=first[0], first_key=first[1])
                )
                turn = policy.renderer.encode_turn(utterance)
                ends.append([*window, *turn.actions])
        self._score(longer, ends, memory)
        return longer, memory

    def _score(self, beams: Sequence[_Beam], ends: Sequence[list[int]], memory: CacheMemory) -> None:
        """Set `score`, `paid`, `utterances` and `ended` of beams that were just extended by an utterance, in place.

        Args:
          beams: the beams; the last turn of each is the new utterance.
          ends: per beam, the ids that the model reads, up to and including the last token of that utterance.
          memory: holds the caches of the beams.
        """
        planner, gamma = self.planner, self.planner.discount
        outcomes: Sequence[Sequence[float]] = [(0.0, 0.0, 0.0)] * len(beams)
        if planner.heads is not None:
            keys = [beam.key for beam in beams]
            outcomes = self.policy.sampler.apply_head(
                lambda hidden, _: planner.heads.outcome(hidden), ends, memory, keys
            )
        rated = None
        if planner.scorer is not None:
            asked: list[Scored] = [(as_context(beam.turns[:-1]), [(beam.turns[-1],)]) for beam in beams]
            rated = [float(score[0]) for score in score_rows(asked, planner.scorer)]
        for i, (beam, (reward, after, ended)) in enumerate(zip(beams, outcomes, strict=True)):
            value = planner.unit * (reward + gamma * after) if rated is None else rated[i]
            beam.score = beam.paid + gamma**beam.utterances * value
            beam.paid += gamma**beam.utterances * planner.unit * reward
            beam.utterances += 1
            beam.ended = ended >= 0.5

    def _imagined(self, beams: Sequence[_Beam], memory: CacheMemory) -> tuple[list[_Beam], CacheMemory]:
        """Extend each beam by the environment's imagined answer.

        A beam ends if max_length leaves no space for the answer; training leaves out such answers, too.

        Args:
          beams: the beams to extend; `ended` is set in place on those that end here.
          memory: holds the caches of `beams`.
        Returns: the extended beams, without those that ended, and the memory that holds their caches.
        """
        # All rows play one game, so the environment's role is the same in all.
        role, policy = _speaker(beams[0].turns), self.policy
        reserve = policy.decoding.max_new_tokens
        found = [(beam, policy.null_reply_window(beam.turns, role, reserve)) for beam in beams]
        for beam, window in found:
            beam.ended = window is None
        beams, windows = [beam for beam in beams if not beam.ended], [window for _, window in found if window]
        if len(beams) < len(found):
            self.planner.say_no_room()
        if not beams:
            return [], memory
        memory = memory.fork({i: beam.key for i, beam in enumerate(beams)})
        rows = range(len(beams))
        replies = self.planner.environment(role).sample(windows, [0] * len(beams), memory=memory, rows=rows)
        imagined = []
        for i, (beam, reply) in enumerate(zip(beams, replies, strict=True)):
            self.planned_tokens[beam.row] += len(reply.log_prob)
            text = policy.renderer.decode(reply.token_ids[: len(reply.token_ids) - reply.closed], role)
            imagined.append(replace(beam, turns=[*beam.turns, Turn(role, text)], key=i))
        return imagined, memory


class ValueModelScorer:
    """A scorer of replies by the Q heads of a trained run; implements Scorer.

    The score is the minimum over the target Q heads of Q at the token that closes the reply: the expected reward of
    the reply plus the return after it, in reward units. If the run's training shifted the rewards (`RewardScale`), a
    constant is missing from the score.

    Args:
      value_model: the run, loaded as a policy.
    Raises: InputError if the model has no value heads.
    """

    def __init__(self, value_model: LanguagePolicy):
        if part_of(value_model.model, "value_heads") is None:
            raise InputError("scorer: found a model without value heads, expected one that has them (an ILQL run)")
        self.value_model = value_model
        self.unit = RewardScale(**run_metadata(value_model.model.config).get("reward_scale", {})).scale

    def score(self, context: Sequence[Turn], options: Sequence[Sequence[Turn]]) -> np.ndarray:
        return self.score_each([(context, options)])[0]

    def score_each(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        """Return, per pair of context and K options in `rows`, the K scores, (K,); an option is one agent turn."""
        value_model, prompts = self.value_model, []
        for context, options in rows:
            turns = [value_model.renderer.encode_turn(replace(reply, token_ids=None)) for (reply,) in options]
            replies = [turn.actions for turn in turns]
            past = [replace(t, trainable=None, token_ids=None) for t in context]
            window = value_model.null_window(past, max(map(len, replies)))
            prompts += [[*window, *reply[:-1]] for reply in replies]

        def closing(hidden, _):
            token = hidden.new_full((len(hidden), 1), value_model.renderer.close_id).long()
            return value_model.model.q_values(hidden, candidates=token).amin(0).squeeze(-1)

        scores = self.unit * np.array(value_model.sampler.apply_head(closing, prompts))
        return np.split(scores, np.cumsum([len(options) for _, options in rows])[:-1])


def _speaker(turns: Sequence[Turn]) -> str:
    """Return the role of the environment's latest turn, or "user" if it has none."""
    return next((turn.role for turn in reversed(turns) if turn.role not in ("assistant", "system")), "user")
