"""Flat columns of encoded data in files: written part by part while processes encode, then mapped into memory.

A column of ends holds, for each list of another column, the number of that column's values up to the list's end, after
a 0.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np


def counted(
    parts: Iterable[tuple[Mapping[str, np.ndarray], Counter[str]]], counts: Counter[str]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the columns of each part, and add what was counted while the part was made to `counts`."""
    for part, mine in parts:
        counts.update(mine)
        yield part


def write_columns(
    parts: Iterable[Mapping[str, np.ndarray]], files: Mapping[str, BinaryIO], ends: Mapping[str, str]
) -> Counter[str]:
    """Append the columns of all parts to one file per column.

    Args:
      parts: name -> values of a part of the data; ends count from the start of the part.
      files: name -> empty file.
      ends: name of a column of ends -> the column whose values it counts.
    Returns: name -> number of values written; of ends, without the 0 at their start.
    """
    sizes: Counter[str] = Counter(dict.fromkeys(files, 0))
    for name in ends:
        files[name].write(bytes(8))
    for part in parts:
        for name, values in part.items():
            values = np.asarray(values)
            files[name].write((values + sizes[ends[name]] if name in ends else values).tobytes())
        sizes.update({name: len(values) for name, values in part.items()})
    for file in files.values():
        file.flush()
    return sizes


def map_columns(files: Mapping[str, BinaryIO | Path], kinds: Mapping[str, np.dtype | str]) -> dict[str, np.ndarray]:
    """Return the columns of some files, read from them only where they are used.

    Args:
      files: name -> file, as `write_columns` wrote it.
      kinds: name -> type of the values.
    """
    return {name: _mapped(file, np.dtype(kinds[name])) for name, file in files.items()}


def _mapped(file: BinaryIO | Path, kind: np.dtype) -> np.ndarray:
    size = file.stat().st_size if isinstance(file, Path) else file.seek(0, 2)
    return np.asarray(np.memmap(file, kind, "r")) if size else np.zeros(0, kind)  # an empty file has no map
