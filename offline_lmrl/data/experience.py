"""Episodes as a policy has just played them, step by step: what online algorithms read, credit and learn from."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.data.batching import WindowDataset, encode_trajectories, places_of
from offline_lmrl.data.episodes import EpisodeEncoder, Window
from offline_lmrl.data.trajectory import Trajectory


class _Numbering:
    """An encoder that remembers which trajectory every window came from."""

    def __init__(self, encoder: EpisodeEncoder):
        self.encoder, self.number, self.of_window = encoder, -1, []

    def encode(self, trajectory: Trajectory, counts: Counter[str]) -> Iterator[Window]:
        self.number += 1
        for window in self.encoder.encode(trajectory, counts):
            self.of_window.append(self.number)
            yield window


@dataclass
class Experience:
    """Episodes to learn from: windows whose columns hold what was read and credited, one number per step.

    windows: with rows for next states, until V has been read there. episode: (N,) which trajectory each step is from.
    n: of the trajectories. kept: (N, V/8) bits of the tokens that filters left to the sampler; None = all.
    """

    windows: WindowDataset
    episode: np.ndarray
    n: int
    kept: np.ndarray | None = None

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], encoder: EpisodeEncoder, counts: Counter[str], pad_id: int
    ) -> "Experience":
        """As played, none of it read yet. counts, pad_id: as for `encode_trajectories` and `WindowDataset`."""
        numbering = _Numbering(encoder)
        columns = encode_trajectories(trajectories, numbering, counts)
        windows = WindowDataset(columns, pad_id, next_rows=True, end_rows=False)
        episode = np.repeat(numbering.of_window, np.diff(columns["state"][1]))
        return cls(windows, episode, len(trajectories))

    def column(self, name: str) -> Tensor:
        """(N,)"""
        return torch.from_numpy(np.asarray(self.windows.flat[name][0]))

    def add(self, **columns: Tensor | np.ndarray) -> None:
        offsets = self.windows.flat["state"][1]
        self.windows.flat = {**self.windows.flat, **{n: (np.asarray(c), offsets) for n, c in columns.items()}}

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """Per step: trajectory, turn in it, and token of that turn."""
        turn, state, start = (self.windows.flat[name][0] for name in ("turn", "state", "open_state"))
        return zip(self.episode.tolist(), turn.tolist(), (state - start).tolist(), strict=True)

    def places(self, index: np.ndarray) -> np.ndarray:
        """Positions among the N of the steps of these windows."""
        return places_of(self.windows.flat["state"][1], index)[0]

    def keep(self, places: np.ndarray, kept: Tensor) -> None:
        """Notes which tokens filters left at these places, (n, V) bool."""
        if self.kept is None:
            self.kept = np.zeros((len(self.episode), -(-kept.shape[1] // 8)), dtype=np.uint8)
        self.kept[places] = np.packbits(kept.cpu().numpy(), axis=1)

    def kept_at(self, places: np.ndarray, vocabulary: int) -> Tensor | None:
        """The inverse of `keep`, (n, V); None = all are left everywhere."""
        if self.kept is None:
            return None
        bits = np.unpackbits(self.kept[places], axis=1, count=vocabulary)
        return torch.from_numpy(bits).bool()
