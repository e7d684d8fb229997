"""Acceptance gate of demonstration prompts: a rule that was never trained on is read off one demonstration.
`pytest -m gates`."""

import pytest

from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.tasks.hidden_rule import HELD_OUT, HiddenRule
from offline_lmrl.tokens.few_shot import FewShotConfig
from tests.gates.small import SPEC, fitted

pytestmark = pytest.mark.gates

# A convolution over six tokens tells an answer which cue it was given to, so one layer of attention can look it up;
# attention alone finds that out after many times as many steps.
CONVOLUTION = {
    **SPEC,
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "conv_L_cache": 6,
    "block_auto_adjust_ff_dim": False,
}


class Shown:
    """A policy that reads demonstrations of the rule of the episode `shift` seeds on: 0 is the right one."""

    def __init__(self, policy, game, shift):
        shown = {demonstration.task: demonstration for demonstration in game.demonstrations(1, seed=100)}
        self.policy, self.of_seed = policy, lambda seed: [shown[game.task(seed + shift)]]

    def start(self, seeds):
        return self.policy.start(seeds, few_shot=[self.of_seed(seed) for seed in seeds])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_new_rule_is_followed_behind_its_demonstration_alone(tmp_path, seed):
    training, new = HiddenRule(), HiddenRule(held_out=True)
    write_trajectories(tmp_path / "shown.jsonl", training.demonstrations(4, seed))
    logs = training.logs(10_000, seed) + training.demonstrations(8, seed + 7)
    few_shot = FewShotConfig(max_tokens=48, demonstrations=str(tmp_path / "shown.jsonl"))
    run = fitted(
        ReturnConditionedConfig,
        ReturnConditionedTrainer,
        tmp_path / "run",
        logs,
        seed,
        1500,
        spec=CONVOLUTION,
        learning_rate=3e-3,
        condition_dropout=0.0,
        few_shot=few_shot,
    )
    policy = LanguagePolicy(run.model, run.renderer, DecodingConfig(max_new_tokens=4, ask="max"), max_length=96)

    def right(policy, game):
        """The share of right answers over as many rules as are held out."""
        played = rollout(policy, lambda: HiddenRule(held_out=game is new), range(HELD_OUT))
        return sum(t.total_return for t in played) / (4 * HELD_OUT)

    chance = 1 / 8
    assert right(Shown(policy, new, 0), new) >= 0.9
    assert right(Shown(policy, new, 1), new) <= chance + 0.1
    assert right(policy, new) <= chance + 0.1
    assert right(Shown(policy, training, 0), training) - right(Shown(policy, new, 0), new) < 0.05
