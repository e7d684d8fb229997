"""What no loss reaches is frozen before training, and nothing else is."""

from collections import Counter

import pytest
import torch
from torch import nn

from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.unreached import freeze_unreached
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.families import small_model
from tests.tiny_models import packed_of, tiny_batch
from tests.training.test_trainer import logs, trainer


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "got_ocr2"])
def test_of_a_model_for_images_text_trains_the_text_part_alone(tmp_path, family):
    run = trainer(tmp_path, model=small_model(family), algorithm="bc", max_steps=2)
    parts = Counter((name.split(".")[1], p.requires_grad) for name, p in run.model.named_parameters())
    assert ("language_model", True) in parts and ("language_model", False) not in parts
    assert all(part in ("language_model", "weight") or not trained for part, trained in parts)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    in_optimizer = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in run.model.named_parameters():
        assert (id(p) in in_optimizer) == p.requires_grad, name
        assert p.requires_grad or torch.equal(p, before[name]), name


@pytest.mark.parametrize("algorithm", ["bc", "ilql", "return_conditioned"])
def test_of_a_text_model_everything_but_the_targets_is_trained(tmp_path, algorithm):
    run = trainer(tmp_path, algorithm=algorithm, data=logs(4))
    assert all("target" in name for name in frozen(run.model))


def test_heads_that_a_loss_does_not_read_are_frozen():
    model = add_value_heads(small_model("llama"), ValueHeadsConfig())
    batch = tiny_batch()
    freeze_unreached(model, packed_of(model, batch)["log_prob"].sum())
    assert frozen(model) == {name for name, _ in model.named_parameters() if name.startswith("value_heads")}


class Experts(nn.Module):
    """One expert per number, of which a batch reads those that it names; the last is of another kind."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
        self.shared = nn.Linear(2, 2)

    def forward(self, *numbers):
        return sum(self.experts[n](self.shared(torch.ones(2))) for n in numbers).sum()


def test_experts_stay_free_as_long_as_one_of_their_kind_is_read():
    model = Experts()
    assert freeze_unreached(model, model(1))
    assert frozen(model) == {"experts.2.0.weight", "experts.2.0.bias"}
    assert not freeze_unreached(model, model(0, 1))
