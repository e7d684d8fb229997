"""Policy extraction of IQL (Kostrikov, Nair, Levine 2021, section 4.3).

Advantage-weighted regression (Peng et al. 2019) from a frozen value model into a plain policy, which decodes without
heads:

    L = −min(exp(β_w · (min_i Q̄_i(s,a) − V(s))), c) · log π(a|s)            over the agent's N action tokens

with twin target heads Q̄_i. The paper calls β_w an inverse temperature, and its code sets c = 100. Weights carry no
gradient. The value model, usually an ILQL run, has learnt Q and V before. It evaluates the same windows (rows of
tokens cut from the trajectories) as the policy, so every action token has one fixed weight.

Deviations from the paper:
- The value model is trained first and frozen, instead of beside the policy (the policy never enters its losses).
- Advantages are in the value model's scaled reward units, as in ILQL's weighted loss: a reward is divided by the range
  of the training returns, so β_w is per range. In the paper each task scales returns in another way.
- An action is a token, not a reply, so weights vary along a reply.
`inverse_temperature: 0` makes all weights 1, which is behaviour cloning.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor

from offline_lmrl.decoding.policy import LanguagePolicy, load_value_model
from offline_lmrl.decoding.value_model import log_encoder
from offline_lmrl.errors import require
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.step_outputs import compute_step_outputs
from offline_lmrl.ops.value_learning import awr_weight
from offline_lmrl.settings import setting
from offline_lmrl.tokens.batching import WindowDataset
from offline_lmrl.training.config import OfflineConfig, check_range
from offline_lmrl.training.trainer import Encoding, OfflineTrainer


@dataclass
class AWRConfig(OfflineConfig):
    """The settings of AWR; square brackets hold the paper's value."""

    value_model: str | None = setting(
        None,
        "Folder or hub name of a run with value heads; required. Its context, stride, max_length, template, few_shot "
        "and tokenizer must equal those of this run, which uses the value model's reward scale and discounts.",
    )
    inverse_temperature: float = setting(
        3.0,
        "β_w, per range of the training returns; a larger value puts weight on fewer actions; 0 = behaviour cloning "
        "[3; 10 for AntMaze].",
    )
    weight_clip: float = setting(100.0, "c, the largest weight of a token [100].")

    def __post_init__(self) -> None:
        require(
            self.value_model is not None,
            "value_model: missing, expected the folder or hub name of a run with value heads (ILQL)",
        )
        check_range(self, inverse_temperature=(0, 1e6), weight_clip=(1e-6, 1e6))
        super().__post_init__()

    @property
    def named_run(self) -> str | None:
        return self.value_model


def awr_loss(outputs: Mapping[str, Tensor], steps: Mapping[str, Tensor], config: AWRConfig) -> tuple[Tensor, Tensor]:
    """Compute the loss and the weight of each of N action tokens (tokens that the agent wrote).

    Args:
      outputs: "log_prob" (N,), log π(a|s) of the policy in nats.
      steps: `ActionSteps` (tokens/batching.py) with a further entry "advantage" (N,), Q − V of the value model, in
        scaled reward units.
      config: gives β_w (`inverse_temperature`) and c (`weight_clip`).
    Returns: loss and weight, each (N,).
    """
    weight = awr_weight(steps["advantage"], config.inverse_temperature, config.weight_clip)
    return -weight * outputs["log_prob"], weight


class AWRTrainer(OfflineTrainer):
    """The trainer that fits a plain policy (no value heads) by advantage-weighted regression.

    While the trainer is built, the value model computes the advantages of all windows (rows of tokens cut from the
    trajectories) once, each process a share of them. Then the value model is released.

    It takes the arguments of `OfflineTrainer`: model, settings, training data, held-out data, tokenizer, peft config.
    """

    algorithm = "awr"

    def encoding(self, model, train) -> Encoding:
        value_model = load_value_model(self.args.value_model, device=self.args.device)
        logged = log_encoder(value_model)
        require(
            logged.return_ids_for is None,
            "value_model: found a model that is conditioned on returns, expected one that is not",
        )
        self._check_same_windows(value_model)
        require(
            self.args.reward_scale in (None, logged.scale.scale),
            f"reward_scale: found {self.args.reward_scale}, expected the value model's {logged.scale.scale:g}: "
            "its Q and V are in that unit; leave it out",
        )
        columns = partial(self._advantages, value_model.model)
        return Encoding(
            logged.scale, logged.step_rule, columns=columns, request={"alike": self.args.inverse_temperature == 0}
        )

    def _check_same_windows(self, value_model: LanguagePolicy) -> None:
        """Check that this run and the value model see the same tokens in the same windows.

        Raises: InputError that names the setting which differs.
        """
        args, few_shot = self.args, run_metadata(value_model.model.config).get("few_shot")
        windows, tokens = "both use the same windows", "both use the same tokens, in the same chat template"
        found = asdict(args.window) | {"few_shot": args.few_shot and asdict(args.few_shot)}
        for name, expected in (asdict(value_model.window) | {"few_shot": few_shot}).items():
            require(
                found[name] == expected,
                f"{name}: found {found[name]}, expected the value model's {expected}: {windows}",
            )
        require(
            self.renderer.fingerprint == value_model.renderer.fingerprint,
            f"tokenizer: found fingerprint {self.renderer.fingerprint}, expected the value model's "
            f"{value_model.renderer.fingerprint}: {tokens}",
        )

    def _advantages(self, model: torch.nn.Module, windows: WindowDataset) -> dict[str, np.ndarray]:
        """Return "advantage", Q − V of the value model at each of the windows' N steps, (N,)."""
        args = self.args
        share = args.process_index, args.world_size
        values = compute_step_outputs(model, windows, ("target_q", "v"), share=share)
        # Each rank has zeros outside its share, so the sum over ranks is the whole.
        advantage = reduce(torch.from_numpy(values.target_q - values.v).to(args.device), "sum")
        return {"advantage": advantage.cpu().numpy()}

    def losses(self, outputs, batch):
        loss, weight = awr_loss(outputs, batch["steps"], self.args)
        clipped = (weight == self.args.weight_clip).float()
        advantage = batch["steps"]["advantage"]
        return loss, {"loss/policy": loss, "weight": weight, "weight/clipped": clipped, "value/advantage": advantage}


IQLConfig, IQLTrainer = AWRConfig, AWRTrainer  # the old names; version 0.2 is the last to have them
