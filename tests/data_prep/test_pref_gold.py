"""The pref_gold source: what is written is what people said, split without leaks, with gold beside."""

import pytest

from data_prep.pref_gold import PrefGoldPairs
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import group_key, read_comparisons


def test_pairs_are_written_with_gold_as_a_baseline(tmp_path):
    report = PrefGoldPairs(output=tmp_path, pairs=300, temperature=1e-6, flips=0.0, tie=0.0).prepare()
    train, validation = (read_comparisons(tmp_path / f"{name}.jsonl") for name in ("train", "validation"))
    assert len(train) + len(validation) == 300 and not {*map(group_key, train)} & {*map(group_key, validation)}
    assert report["baselines"]["the reply with more gold"]["accuracy"] == 1.0
    with pytest.raises(InputError, match="temperature 0"):
        PrefGoldPairs(output=tmp_path / "no", temperature=0).prepare()
