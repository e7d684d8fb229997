"""A chain of two choices whose values have a closed form: training must reach them. `pytest -m gates`.

    s0: a -> end, 0;  b -> s1        s1: a -> end, 0;  b -> end, 1
    p(b|s0) = .5, p(b|s1) = .25, γ = .9 per choice

A choice between 0 with share 1 − p and Q with share p has the expectile V = τp / (τp + (1 − τ)(1 − p)) · Q.
"""

import pytest
import torch
import transformers

from offline_lmrl.algorithms.ilql import ILQLConfig, ILQLTrainer
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.loading import build_model
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import WindowRule, policy_window

pytestmark = pytest.mark.gates

SPEC = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
S0 = (Turn("user", "0"),)
S1 = (*S0, Turn("assistant", "b", reward=0.0), Turn("user", "1"))
# Eight episodes hold the shares exactly, and a batch is all of their windows (12 of one turn): sampling adds no noise.
EPISODES = [
    *[Trajectory((*S0, Turn("assistant", "a", reward=0.0)))] * 4,
    *[Trajectory((*S1, Turn("assistant", "a", reward=0.0)))] * 3,
    Trajectory((*S1, Turn("assistant", "b", reward=1.0))),
]


def learnt(folder, context, **settings):
    """V(s0), Q(s0,b), V(s1), Q(s1,b) after training; Q is the smaller of the twin targets."""
    transformers.set_seed(0)
    tokenizer = train_tokenizer(["0 1 a b"], 264)
    args = ILQLConfig(
        output_dir=str(folder),
        max_steps=1000,
        per_device_train_batch_size=12,
        learning_rate=2e-3,
        weight_decay=0.0,
        lr_scheduler_kwargs={"min_lr_rate": 0.0},
        adam_beta2=0.98,
        max_grad_norm=100.0,
        target_rate=0.1,
        discount_per_turn=0.9,
        conservative_weight=0.0,
        reward_scale=1.0,
        context=context,
        max_length=16,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    run = ILQLTrainer(build_model(SPEC, tokenizer), args, EPISODES, None, tokenizer)
    run.train()
    values = []
    for state in (S0, S1):
        ids = policy_window(state, run.renderer, WindowRule(context, 1, 16))
        with torch.no_grad():
            _, hidden = run.model.eval().forward_with_hidden(input_ids=torch.tensor([ids]))
            b = torch.tensor([run.renderer.encode_content("b")])
            values += [run.model.v_values(hidden[:, -1]).item(), run.model.q_values(hidden[:, -1], b).min().item()]
    return values


@pytest.mark.parametrize(
    "expectile, context, expected",
    [
        (0.5, None, [0.1125, 0.225, 0.25, 1.0]),
        (0.7, None, [0.275625, 0.39375, 0.4375, 1.0]),
        (0.9, None, [0.6075, 0.675, 0.75, 1.0]),
        (0.9, 1, [0.6075, 0.675, 0.75, 1.0]),  # the next state is then read in another row
    ],
)
def test_values_of_the_chain_reach_their_closed_form(tmp_path, expectile, context, expected):
    assert learnt(tmp_path, context, expectile=expectile) == pytest.approx(expected, abs=1e-2)


def test_monte_carlo_values_do_not_stitch(tmp_path):
    # Q(s0,b) is the mean return .9 · .25 whatever τ is; V(s1) = .75 is there, but nothing bootstraps from it.
    values = learnt(tmp_path, None, expectile=0.9, monte_carlo=1.0)
    assert values == pytest.approx([0.2025, 0.225, 0.75, 1.0], abs=1e-2)
