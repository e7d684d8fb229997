"""Nectar: all answers to a prompt, ranked."""

import json

from data_prep.nectar import Nectar
from offline_lmrl.logs.io import read_comparisons


def row(number, ranks=(1, 2, 3), **more):
    answers = [{"answer": f"a{number} {i}", "model": f"m{i}", "rank": rank} for i, rank in enumerate(ranks)]
    return {
        "prompt": f"\n\nHuman: q{number}\n\nAssistant: hm\n\nHuman: go on\n\nAssistant: ",
        "answers": answers,
        "turns": 2,
        "num_responses": len(answers),
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
        **more,
    }


KEPT = [row(0), row(1, (2.0, 1.0, 2.0)), row(2, (1, None, 2))]


def test_answers_are_one_ranked_comparison_and_say_who_wrote_them(tmp_path):
    dropped = [row(3, (1,)), row(4, answers="x"), row(5, prompt=None)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*KEPT, *dropped]))
    report = Nectar(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    made = read_comparisons(tmp_path / "out" / "train.jsonl")
    assert [row.ranking for row in made] == [((0,), (1,), (2,)), ((1,), (0, 2)), ((0,), (1,))]
    assert [turn.content for turn in made[0].context] == ["q0", "hm", "go on"]
    assert [option[0].content for option in made[2].options] == ["a2 0", "a2 2"]
    assert made[2].labels["options"] == [{"model": "m0"}, {"model": "m2"}]
    assert made[0].labels["source"] == ["lmsys-chat-1m"] and made[0].source == "nectar"
    assert report["dropped"] == {
        "fewer than two ranked responses": 1,
        "answers: expected a list": 1,
        "prompt: expected text": 1,
    }
    assert report["repaired"] == {"response without a rank left out": 1}
