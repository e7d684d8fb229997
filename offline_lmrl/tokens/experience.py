"""Episodes that a policy has just played, as arrays with one number per step, for online algorithms.

A step is one token that the agent chose. A window is a row of tokens with agent turns to train on
(tokens/episodes.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.batching import WindowDataset, encoded_windows, joined, places_of
from offline_lmrl.tokens.episodes import EpisodeEncoder, Window
from offline_lmrl.tokens.windows import Ids


@dataclass
class Experience:
    """Played episodes to learn from: windows, and further columns with one number per step, such as advantages.

    windows: the windows with their N steps.
    episode: (N,) index of the trajectory of each step.
    n: number of trajectories.
    """

    windows: WindowDataset
    episode: np.ndarray
    n: int

    @classmethod
    def of(
        cls,
        trajectories: Sequence[Trajectory],
        encoder: EpisodeEncoder,
        counts: Counter[str],
        pad_id: int,
        *,
        next_rows: bool = True,
        few_shot: Iterable[Ids] | None = None,
    ) -> "Experience":
        """Encode trajectories, without further columns.

        Args:
          trajectories: the played episodes.
          encoder: the encoder that cuts them into windows.
          counts: a Counter, updated in place: message -> number of dropped turns or other faults.
          pad_id: the id that fills shorter rows of a batch.
          next_rows: True: a batch includes the rows for V of next states.
          few_shot: per trajectory, the ids of few-shot demonstrations in its windows (`encode_trajectories`).
        """
        of_window: list[int] = []  # index of each window's trajectory

        def numbered() -> Iterator[Window]:
            before = repeat(()) if few_shot is None else few_shot
            for number, (trajectory, ids) in enumerate(zip(trajectories, before, strict=few_shot is not None)):
                for window in encoder.encode(trajectory, counts, ids):
                    of_window.append(number)
                    yield window

        encoded = encoded_windows(numbered(), encoder, counts)
        windows = WindowDataset(encoded, pad_id, next_rows=next_rows, end_rows=False)
        return cls(windows, np.repeat(of_window, np.diff(windows.step_offsets)), len(trajectories))

    @cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """The columns of the steps that `expand` (tokens/steps.py) returns: name -> (N,)."""
        return joined(self.windows.step_parts())

    def column(self, name: str) -> Tensor:
        """Return the column of this name, (N,): one of `steps` or one that `add` stored."""
        return torch.from_numpy({**self.steps, **self.windows.extra}[name])

    def add(self, **columns: Tensor | np.ndarray) -> None:
        """Store further columns with one number per step."""
        self.windows = self.windows.with_columns(**{name: np.asarray(values) for name, values in columns.items()})

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """Yield three indices per step: its trajectory, its turn in the trajectory, its action token in the turn."""
        turn, state, start = (self.steps[name] for name in ("turn", "state", "open_state"))
        return zip(self.episode.tolist(), turn.tolist(), (state - start).tolist(), strict=True)

    def places(self, index: np.ndarray) -> np.ndarray:
        """Return where the steps of some windows are in arrays of N steps.

        Args:
          index: (n,) indices of the windows.
        Returns: the indices of the steps, (m,), in the order of `index`.
        """
        return places_of(self.windows.step_offsets, index)[0]
