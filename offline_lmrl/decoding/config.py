"""The settings of decoding and planning, apart from what they set, so that a help is printed soon."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from offline_lmrl.decoding.distribution import INF, Q_REDUCTIONS, Form, number
from offline_lmrl.errors import InputError, shown
from offline_lmrl.settings import nearest, setting

if TYPE_CHECKING:
    from offline_lmrl.decoding.planner import Planner
    from offline_lmrl.decoding.policy import LanguagePolicy

FROM_1 = "a whole number from 1"
LARGEST = 3.4e38  # tokens are chosen in fp32, which holds no larger number


def check_numbers(config: Any) -> None:
    """Check the fields of a dataclass that `number` made.

    Raises: InputError if one of them is no finite number in its range, or not whole if its type is.
    """
    for one in fields(config):
        value, types = vars(config)[one.name], get_args(one.type) or (one.type,)
        if "expected" not in one.metadata or (value is None and NoneType in types):
            continue
        right = isinstance(value, (int, float) if float in types else int) and not isinstance(value, bool)
        too_large = right and float in types and abs(value) > LARGEST
        if not right or not one.metadata["low"] <= value <= one.metadata["high"] or too_large:
            limit = f", at most {LARGEST:g} in size" if too_large else ""
            raise InputError(f"{one.name}: found {shown(value)}, expected {one.metadata['expected']}{limit}")


@dataclass(frozen=True)
class DecodingConfig(Form):
    """The settings by which the next token is chosen."""

    ask: float | str | None = setting(
        None,
        "The requested return, for a model that was trained with returns. Requested at the agent's first turn, and "
        'then reduced by each reward it earns: a number in reward units, "p90" or "max" (of the training returns), '
        '"auto" (the best Q at the agent\'s first turn), or "auto:RUN" (the best Q of another run there). Computed '
        'anew before every turn: "expert:3" (the expected return after weighting each return R, in scaled units, by '
        "exp(3 · R): `ReturnHeads.expert`). null = no return is requested. The docstring of decoding/asks.py compares "
        "their results.",
    )
    max_new_tokens: int = number(64, "Longest reply in tokens, closing token included.", 1, INF, FROM_1)
    stop: tuple[str, ...] = setting((), "Texts that end a reply; the reply's text is cut before the first of them.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        from offline_lmrl.tokens.conditioning import check_ask

        check_numbers(self)
        check_ask(self.ask)
        if self.q_reduce not in Q_REDUCTIONS:
            raise InputError(f"q_reduce: found {shown(self.q_reduce)}, expected one of {', '.join(Q_REDUCTIONS)}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop: found {shown(self.stop)}, expected texts that are not empty")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return asdict(self) | {"stop": list(self.stop)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecodingConfig":
        """Rebuild the settings from the output of `to_dict`; absent keys take their defaults.

        Raises: InputError if a key is unknown.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"decoding.{name}: found a setting that does not exist{nearest(str(name), known)}")
        return cls(**values)


@dataclass(frozen=True)
class PlannerConfig:
    """The settings of the beam search that plans replies."""

    width: int = number(16, "Beams kept after each utterance, at least 1.", 1, INF, FROM_1)
    expand: int = number(4, "Replies that each beam proposes, at least 1.", 1, INF, FROM_1)
    depth: int = number(1, "Agent utterances to look ahead, at least 1.", 1, INF, FROM_1)
    scorer: str = setting(
        "heads",
        "Rates a beam's last utterance: heads (the model's own return heads), or a run with value heads; in a "
        "comparison, the name of a method, whose run of the same seed is taken.",
    )

    def __post_init__(self) -> None:
        check_numbers(self)

    def planner(self, policy: "LanguagePolicy") -> "Planner":
        """Return a planner with these settings that draws its proposals from `policy`.

        Raises: InputError if `scorer` is a run without value heads, or one that was trained with few-shot
          demonstrations, or as `Planner` does.
        """
        from offline_lmrl.decoding.planner import Planner, ValueModelScorer
        from offline_lmrl.decoding.policy import load_value_model, require_no_few_shot

        scorer = None
        if self.scorer != "heads":
            scorer = ValueModelScorer(require_no_few_shot(load_value_model(self.scorer, device=policy.model.device)))
        return Planner(policy, scorer, width=self.width, expand=self.expand, depth=self.depth)
