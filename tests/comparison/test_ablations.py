"""The sweep over PPO's details toggles what it says it toggles."""

import pytest

from offline_lmrl.algorithms.ppo import PPOConfig
from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.shipped import config_path

CONFIG = CompareConfig.read(config_path("ablations/ppo_details"))
DEFAULT = CONFIG.methods["default"].args
TOGGLES = {
    name: {key: value for key, value in method.args.items() if DEFAULT.get(key, "") != value}
    for name, method in CONFIG.methods.items()
    if name not in ("clone", "default", "all_off")
}


@pytest.mark.parametrize("name", TOGGLES)
def test_a_method_changes_one_setting_from_what_it_is_by_default(name):
    changed = set(TOGGLES[name]) - {"kl_horizon"}  # which says how fast kl_target acts
    assert len(changed) == 1 and not changed & set(DEFAULT)
    (setting,) = changed
    assert PPOConfig.__dataclass_fields__[setting].default != TOGGLES[name][setting]


def test_all_off_is_everything_that_is_on_but_the_clip_of_the_ratio():
    all_off = {key: value for key, value in CONFIG.methods["all_off"].args.items() if key not in DEFAULT}
    on = {}
    for name in ("no_value_clip", "no_annealing", "no_gradient_clip", "no_whitening", "small_epsilon", "no_gae"):
        on |= TOGGLES[name]
    assert all_off == on and CONFIG.baseline == "default" and len(CONFIG.seeds) == 5
