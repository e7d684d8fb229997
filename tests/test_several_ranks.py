"""Several processes: what they do together, each does equally often, whatever rows it was given."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.test_trainer import logs, trainer

EVALUATE = """
import torch
from tests.training.test_trainer import logs, trainer
settings = {settings!r}
for rows in {rows!r}:
    run = trainer(f"{folder}/{{rows}}", held_out=logs(rows), **settings)
    run.train()
    if run.args.process_index == 0:
        torch.save([row["eval_loss"] for row in run.state.log_history if "eval_loss" in row], f"{folder}/{{rows}}.pt")
"""


@pytest.mark.parametrize(
    ("ranks", "algorithm"),
    [(2, "bc"), *(pytest.param(3, name, marks=pytest.mark.slow) for name in ("bc", "ilql", "return_conditioned"))],
)
def test_evaluation_ends_with_fewer_batches_than_ranks_and_counts_each_row_once(tmp_path, ranks, algorithm):
    settings = {
        "algorithm": algorithm,
        "max_steps": 2,
        "learning_rate": 0.0,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    alone, rows = {}, {1: 3, 2: 5}  # batches of eight windows -> dialogues
    for batches, count in rows.items():
        run = trainer(tmp_path / "alone", held_out=logs(count), **settings)
        assert -(-len(run.eval_dataset) // 8) == batches
        alone[count] = run.evaluate()["eval_loss"]
    run_ranks(EVALUATE.format(settings=settings, rows=list(rows.values()), folder=tmp_path), ranks, tmp_path)
    for count in rows.values():
        assert torch.load(tmp_path / f"{count}.pt") == pytest.approx([alone[count]] * 2, rel=1e-5), count


TRAIN = """
import torch
from tests.families import small_model
from tests.training.test_trainer import trainer
torch.manual_seed(0)
run = trainer({folder!r} + "/run", model=small_model({family!r}), algorithm={algorithm!r}, max_steps=3)
run.train()
assert all(p.isfinite().all() for p in run.model.parameters())
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["bc", "ilql"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "mllama"])
def test_models_for_images_train_on_text_in_several_processes(tmp_path, family, algorithm):
    run_ranks(TRAIN.format(folder=str(tmp_path), family=family, algorithm=algorithm), 2, tmp_path)


PLAY = """
import torch
from offline_lmrl.logs.trajectory import Trajectory, Turn
from tests.algorithms.test_ppo import trainer, weights
logs = [Trajectory((Turn("user", "q"), Turn("assistant", "left " * n))) for n in (1, 2, 3)]
run = trainer({folder!r} + "/run", ptx=logs, ptx_weight=0.5, ddp_backend="gloo")
run.train()
found = run.accelerator.gather(weights(run).unsqueeze(0))
if run.args.process_index == 0:
    torch.save(found, {folder!r} + "/weights.pt")
"""


@pytest.mark.slow
def test_ppo_with_logged_data_has_the_same_weights_in_both_processes(tmp_path):
    run_ranks(PLAY.format(folder=str(tmp_path)), 2, tmp_path)
    first, second = torch.load(tmp_path / "weights.pt")
    assert torch.equal(first, second)
