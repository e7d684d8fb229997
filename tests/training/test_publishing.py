"""What is uploaded: models that are whole, never what only resuming needs, with a card; and what the card says."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from offline_lmrl.algorithms.ilql import ILQLConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.training import publishing
from offline_lmrl.training.metrics import FEW, append_metrics, batch_moments, ratio_interval
from tests.training.test_trainer import logs, trainer

PRIVATE = {
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "averages-0.json",
    "trainer_state.json",
    "training_args.bin",
}


class FakeHub:
    """Records what would be created and uploaded, with the files that lie in the folder at that moment."""

    def __init__(self):
        self.created, self.uploads = [], []

    def create_repo(self, name, **settings):
        self.created.append((name, settings["private"]))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, run_as_future, **settings):
        present = {path.name for path in publishing.Path(folder_path).iterdir()}
        assert set(allow_patterns) <= present and ".saving" not in folder_path
        card = (publishing.Path(folder_path) / "README.md").read_text()
        self.uploads.append((repo_id, publishing.Path(folder_path).name, set(allow_patterns), commit_message, card))
        done = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(publishing, "hf_api", lambda: fake)
    return fake


MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MODEL |= {"chat_template.jinja", "README.md"}


def test_every_save_is_uploaded_without_what_resuming_needs(tmp_path, hub):
    settings = {"save_strategy": "steps", "save_steps": 3, "push_to_hub": True, "hub_private_repo": True}
    run = trainer(tmp_path / "run", held_out=logs(12), per_device_eval_batch_size=1, logging_steps=3, **settings)
    run.train()
    assert PRIVATE <= {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    run.save_model()
    assert hub.created == [("run", True)]
    assert [upload[:4] for upload in hub.uploads] == [
        ("me/run", "checkpoint-3", MODEL, "Training in progress, step 3"),
        ("me/run", "checkpoint-6", MODEL, "Training in progress, step 6"),
        ("me/run", "run", MODEL, "Model after 6 steps"),
    ]
    card = (tmp_path / "run" / "README.md").read_text()
    assert card == hub.uploads[-1][-1] and "6 optimizer steps; it learnt from: labels only" in card
    assert "| training | rows of a program | 24 | " in card and "| validation | rows of a program | 12 | " in card
    assert "| monte_carlo | 0.3 |" in card and "expectile" not in card  # only what differs from its default
    assert "] |\n" in card.partition("| eval_loss | ")[2].partition("| eval_loss/q")[0]  # an interval


def test_only_the_end_is_uploaded_if_asked(tmp_path, hub):
    run = trainer(
        tmp_path, save_strategy="steps", save_steps=3, push_to_hub=True, hub_strategy="end", hub_model_id="m"
    )
    run.train()
    run.push_to_hub()
    assert [upload[3] for upload in hub.uploads] == ["Model after 6 steps"]
    assert "offline-lmrl serve me/m\n" in (tmp_path / "README.md").read_text()


def failed(*args, **kwargs):
    done = Future()
    done.set_exception(OSError("403 Forbidden\nmore"))
    return done


def test_a_failed_upload_is_a_warning_at_checkpoints_and_an_error_at_the_end(tmp_path, hub, monkeypatch, caplog):
    monkeypatch.setattr(hub, "upload_folder", failed)
    run = trainer(tmp_path / "run", save_strategy="steps", save_steps=6, push_to_hub=True)
    run.train()
    assert "me/run: the upload of " in caplog.text and "checkpoint-6 failed: 403 Forbidden" in caplog.text
    with pytest.raises(InputError, match=r"^me/run: the upload failed \(403 Forbidden\)"):
        run.save_model()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_repository_that_cannot_be_created_is_refused_before_training(tmp_path, hub, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(InputError, match=r"^push_to_hub: found no repository run, .* \(401 Unauthorized\)$"):
        trainer(tmp_path / "run", push_to_hub=True)


def test_the_card_names_no_place_on_this_machine(tmp_path, hub):
    write_trajectories(tmp_path / "train.jsonl", logs())
    trainer(tmp_path / "base", algorithm="bc", max_steps=1).save_model()
    run = trainer(
        tmp_path / "run",
        model=str(tmp_path / "base"),
        data=str(tmp_path / "train.jsonl"),
        max_steps=1,
        push_to_hub=True,
    )
    run.train()
    run.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert str(tmp_path) not in card and "base_model" not in card
    assert "from base, 1 optimizer steps" in card and "| training | train.jsonl | 24 |" in card
    assert "# me/run\n" in card
    shown = {"few_shot": {"demonstrations": str(tmp_path / "train.jsonl")}}
    assert publishing.changed_settings(ILQLConfig(**shown))["few_shot"]["demonstrations"] == "train.jsonl"


def test_nothing_is_created_unless_asked(tmp_path, hub):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model()
    assert (hub.created, hub.uploads) == ([], []) and (tmp_path / "README.md").exists()


def test_resume_state_cannot_be_asked_for(tmp_path):
    with pytest.raises(InputError, match="hub_strategy: found checkpoint, expected end or every_save"):
        ILQLConfig(output_dir=str(tmp_path), hub_strategy="checkpoint")


def test_the_files_of_an_adapter_are_its_own_and_its_heads(tmp_path):
    pytest.importorskip("peft")
    import peft

    trainer(tmp_path / "base", max_steps=1).save_model()
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    run = trainer(tmp_path / "run", model=str(tmp_path / "base"), lora=adapter, max_steps=1, save_strategy="steps")
    run.train()
    assert set(publishing.model_files(tmp_path / "run" / "checkpoint-1")) == {
        "adapter_config.json", "adapter_model.safetensors", "offline_lmrl.json", "value_heads.safetensors",
        "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert (tmp_path / "run" / "checkpoint-1" / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_the_card_has_the_last_values_with_their_intervals(tmp_path):
    append_metrics(tmp_path, {"step": 1, "loss": 3.0, "environment/score": 0.5, "learning_rate": 1.0})
    append_metrics(tmp_path, {"step": 2, "loss": 2.0})
    append_metrics(tmp_path, {"step": 2, "environment/score": 0.6, "environment/score_low": 0.4})
    append_metrics(tmp_path, {"step": 2, "environment/score_high": 0.8})
    assert publishing._last_values(publishing.read_metrics(tmp_path)) == {
        "loss": "2", "environment/score": "0.6 [0.4, 0.8]"
    }  # fmt: skip


def test_the_interval_of_the_loss_is_that_of_a_ratio_of_batch_means():
    import torch

    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(size, generator=generator) for size in (3, 5, 4) * 10]
    moments = sum(batch_moments(batch).double() for batch in batches)
    low, high = ratio_interval(*moments.tolist())
    sums, counts = torch.tensor([[batch.sum(), len(batch)] for batch in batches], dtype=torch.float64).T
    ratio, n = sums.sum() / counts.sum(), len(batches)
    error = ((sums - ratio * counts).square().sum() * n / (n - 1)).sqrt() / counts.sum()
    assert (low + high) / 2 == pytest.approx(float(ratio))
    assert (high - low) / 2 == pytest.approx(float(1.96 * error), rel=1e-4)
    assert ratio_interval(FEW - 1, 1.0, 1.0, 1.0, 1.0, 1.0) is None
