"""Episodes that a policy has just played, as arrays with one number per step, for online algorithms."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories, places_of
from offline_lmrl.tokens.episodes import EpisodeEncoder, Window


class _Numbering:
    """A wrapper around an encoder that records which trajectory each window came from."""

    def __init__(self, encoder: EpisodeEncoder):
        self.encoder, self.number, self.of_window = encoder, -1, []

    def encode(self, trajectory: Trajectory, counts: Counter[str]) -> Iterator[Window]:
        self.number += 1
        for window in self.encoder.encode(trajectory, counts):
            self.of_window.append(self.number)
            yield window


@dataclass
class Experience:
    """Played episodes to learn from: windows, with columns of further results, one number per step.

    windows: include rows for next states until V has been computed there.
    episode: (N,) index of the trajectory of each step.
    n: number of trajectories.
    kept: (N, V/8) bits: the tokens that the sampler's filters kept; None = all tokens.
    """

    windows: WindowDataset
    episode: np.ndarray
    n: int
    kept: np.ndarray | None = None

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], encoder: EpisodeEncoder, counts: Counter[str], pad_id: int
    ) -> "Experience":
        """Encode trajectories as played, without further columns.

        Args:
          counts: as for `encode_trajectories`.
          pad_id: as for `WindowDataset`.
        """
        numbering = _Numbering(encoder)
        columns = encode_trajectories(trajectories, numbering, counts)
        windows = WindowDataset(columns, pad_id, next_rows=True, end_rows=False)
        episode = np.repeat(numbering.of_window, np.diff(columns["state"][1]))
        return cls(windows, episode, len(trajectories))

    def column(self, name: str) -> Tensor:
        """Return a column, (N,)."""
        return torch.from_numpy(np.asarray(self.windows.flat[name][0]))

    def add(self, **columns: Tensor | np.ndarray) -> None:
        offsets = self.windows.flat["state"][1]
        self.windows.flat = {**self.windows.flat, **{n: (np.asarray(c), offsets) for n, c in columns.items()}}

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """Yield, for each step, the indices of its trajectory, of the turn in it, and of the action in that turn."""
        turn, state, start = (self.windows.flat[name][0] for name in ("turn", "state", "open_state"))
        return zip(self.episode.tolist(), turn.tolist(), (state - start).tolist(), strict=True)

    def places(self, index: np.ndarray) -> np.ndarray:
        """Return the positions, among the N steps, of the steps of these windows."""
        return places_of(self.windows.flat["state"][1], index)[0]

    def keep(self, places: np.ndarray, kept: Tensor) -> None:
        """Store which tokens the filters kept, (n, V) bool, at n of the N steps."""
        if self.kept is None:
            self.kept = np.zeros((len(self.episode), -(-kept.shape[1] // 8)), dtype=np.uint8)
        self.kept[places] = np.packbits(kept.cpu().numpy(), axis=1)

    def kept_at(self, places: np.ndarray, vocabulary: int) -> Tensor | None:
        """Return the tokens that `keep` stored for these steps, (n, V) bool; None = all tokens at all steps."""
        if self.kept is None:
            return None
        bits = np.unpackbits(self.kept[places], axis=1, count=vocabulary)
        return torch.from_numpy(bits).bool()
