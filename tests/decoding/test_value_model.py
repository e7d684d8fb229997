"""A critic on logs: what it reads does not depend on how it reads, and returns are relabelled as by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.decoding.policy import LanguagePolicy, load_value_model
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.decoding.value_model import log_encoder, relabel
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.offline import measure_logs
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.step_outputs import compute_step_outputs
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3 4 5 6 7 8 9"], 300)
SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def user(text):
    return Turn("user", text)


def agent(text, reward=None):
    return Turn("assistant", text, reward=reward)


THREE = (user("at 1"), agent("left", 1.0), user("at 2"), agent("right up"), user("at 3"), agent("down", -2.0))
LOGS = [
    Trajectory(THREE, group="g", labels={"won": True}),
    Trajectory((user("at 4"), agent("up", 3.0))),
    Trajectory((*THREE, user("at 5")), terminated=False),  # V closes it at the next opening
    Trajectory(THREE, terminated=False),  # nothing was read behind the last turn
]


def critic(folder, kind="tied", logs=LOGS, **settings):
    """A run whose value heads are far from constant; target and online heads differ."""
    torch.manual_seed(0)
    args = ILQLConfig(
        output_dir=str(folder),
        max_length=64,
        use_cpu=True,
        report_to="none",
        value_heads=kind,
        **{"reward_scale": 4.0, **settings},
    )
    run = ILQLTrainer(build_model(SPEC, TOKENIZER), args, logs, None, TOKENIZER)
    for parameter in run.model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run.save_model(str(folder))
    return LanguagePolicy.load(folder, device="cpu")


def returns(trajectories):
    return [t.labels["return_to_go"] for t in trajectories]


@pytest.mark.parametrize("context", [None, 1])
def test_relabelled_returns_equal_those_worked_out_from_q_and_v_per_token(tmp_path, context):
    judge = critic(tmp_path, context=context)
    (first, one, cut, finished) = returns(relabel(LOGS, judge))
    steps = measure_logs(judge, LOGS)

    def v(trajectory, turn):
        return steps.v[(steps.trajectory == trajectory) & (steps.turn == turn)]

    # r = 1, 0, −2 in reward units; V where the second and the third turn open
    last = -2.0
    middle = 0.0 + max(last, v(0, 5)[0])
    assert first == pytest.approx([1.0 + max(middle, v(0, 3)[0]), middle, last], abs=1e-4)
    assert one == pytest.approx([3.0], abs=1e-5)
    render = judge.renderer  # V behind the observation at which the log was cut, read by hand
    seen = [*THREE, user("at 5")] if context is None else [user("at 5")]
    ids = [*render.preamble_of(()), *(i for turn in seen for i in render.encode_turn(turn).ids), *render.agent_opening]
    with torch.no_grad():
        _, hidden = judge.model.forward_with_hidden(input_ids=torch.tensor([ids]))
        behind = 4.0 * judge.model.v_values(hidden[0, -1]).item()
    assert abs(behind) > 0.05
    last = -2.0 + behind
    middle = max(last, v(2, 5)[0])
    assert cut == pytest.approx([1.0 + max(middle, v(2, 3)[0]), middle, last], abs=1e-4)
    last = v(3, 5)[-1]
    middle = max(last, v(3, 5)[0])
    assert finished == pytest.approx([1.0 + max(middle, v(3, 3)[0]), middle, last], abs=1e-4)


def test_the_q_label_is_the_smaller_target_of_the_closing_token(tmp_path):
    judge = critic(tmp_path, "linear", decoding=DecodingConfig(q_reduce="mean"))  # how the run decodes does not matter
    first, one, cut, finished = returns(relabel(LOGS, judge, "q"))
    judge.decoding = type(judge.decoding)(q_reduce="min")
    steps = measure_logs(judge, LOGS)
    closing = [
        steps.q[(steps.trajectory == i) & (steps.turn == k)][-1]
        for i in range(3)
        for k in (1, 3, 5)
        if (i, k) not in ((1, 3), (1, 5))
    ]
    assert [*first, *one, *cut] == pytest.approx(closing, abs=1e-4)
    assert finished[-1] == pytest.approx(steps.v[(steps.trajectory == 3) & (steps.turn == 5)][-1], abs=1e-4)
    assert returns(relabel(LOGS, judge)) != [first, one, cut, finished]


def test_all_else_in_the_logs_stays_and_a_folder_will_do(tmp_path):
    judge = critic(tmp_path)
    found = relabel(LOGS, tmp_path)
    assert returns(found) == returns(relabel(LOGS, judge))
    assert [t.turns for t in found] == [t.turns for t in LOGS] and found[0].group == "g"
    assert found[0].labels["won"] is True and not found[2].terminated
    assert "return_to_go" not in LOGS[0].labels


def test_the_shift_of_rewards_is_put_back(tmp_path):
    logs = [Trajectory(THREE[:4]), Trajectory((user("at 4"), agent("up", 3.0)))]  # one scored turn each
    judge = critic(tmp_path, logs=logs, discount_per_turn=1.0)
    assert log_encoder(judge).scale.shift == 2.0
    (first, second), (one,) = returns(relabel(logs, judge))
    assert one == pytest.approx(3.0, abs=1e-5) and second == pytest.approx(0.0, abs=1e-5)
    steps = measure_logs(judge, logs)
    v = steps.v[(steps.trajectory == 0) & (steps.turn == 3)][0]
    assert first == pytest.approx(1.0 + max(0.0, v), abs=1e-4)


def test_what_is_read_does_not_depend_on_batches_or_on_who_reads_which(tmp_path):
    judge = critic(tmp_path, context=2)
    encoded = encode_trajectories(LOGS, log_encoder(judge), Counter())
    windows = WindowDataset(encoded, 0, next_rows=True, end_rows=False)
    want = ("target_q", "v", "next_v")
    whole, single, *halves = (
        compute_step_outputs(judge.model, windows, want, token_budget=budget, share=share)
        for budget, share in ((4096, (0, 1)), (1, (0, 1)), (128, (0, 2)), (128, (1, 2)))
    )
    for name in want:
        values, alone, first, second = (getattr(outputs, name) for outputs in (whole, single, *halves))
        assert len(np.unique(values)) > 5
        np.testing.assert_allclose(alone, values, atol=1e-5)
        np.testing.assert_allclose(first + second, values, atol=1e-5)
        assert first.any() and second.any() and not (first * second).any()


def test_wrong_labels_models_without_heads_and_turns_that_do_not_fit_are_refused(tmp_path):
    judge = critic(tmp_path / "run")
    with pytest.raises(InputError, match="label: found 'mean', expected 'max' or 'q'"):
        relabel(LOGS, judge, "mean")
    build_model(SPEC, TOKENIZER).save_pretrained(tmp_path / "plain")
    TOKENIZER.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="value_model: .*plain: found a model without value heads"):
        load_value_model(tmp_path / "plain")
    long = Trajectory((user("at 1"), agent("x" * 80, 1.0)))
    with pytest.raises(
        InputError, match="relabel: found 1 agent turns that do not fit the value model's window of 64"
    ):
        relabel([*LOGS, long], judge)
    judge.model.config.offline_lmrl = judge.model.config.offline_lmrl | {"few_shot": {"n": 1}}
    with pytest.raises(InputError, match="value_model: found a model trained with few-shot demonstrations"):
        relabel(LOGS, judge)
