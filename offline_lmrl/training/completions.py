"""Sample replies to held-out prompts at every evaluation: in a file of the run, on a terminal, and in trackers."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.errors import reading
from offline_lmrl.logs.files import writing
from offline_lmrl.logs.io import write_text
from offline_lmrl.logs.trajectory import Trajectory, Turn

if TYPE_CHECKING:
    from offline_lmrl.training.trainer import OfflineTrainer

COMPLETIONS = "completions.jsonl"
TABLES = ("wandb", "trackio")  # trackers with a Table for texts


def prompts_of(rows: Sequence[Trajectory], n: int) -> list[tuple[list[Turn], str]]:
    """Return (turns before the agent's first turn, that turn's logged text) of the first n different prompts."""
    found: dict[tuple[str, ...], tuple[list[Turn], str]] = {}
    for row in rows:
        first = next((i for i, turn in enumerate(row.turns) if turn.is_trainable), None)
        if first and len(found) < n:
            turns = list(row.turns[:first])
            found.setdefault(tuple(turn.content for turn in turns), (turns, row.turns[first].content))
    return list(found.values())


class LogCompletions(TrainerCallback):
    """A callback that samples one reply to each prompt after every evaluation, always with the same seeds.

    Args:
      trainer: gives the policy in training, and shows the replies.
      prompts: (turns, logged reply) pairs.
    Raises: InputError if the policy cannot reply within max_length.
    """

    def __init__(self, trainer: "OfflineTrainer", prompts: Sequence[tuple[list[Turn], str]]):
        self.trainer, self.prompts = trainer, prompts
        policy = trainer.policy()
        for turns, _ in prompts:
            policy.null_window(turns, policy.decoding.max_new_tokens)  # raises now, not at the first evaluation

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop the replies of later steps, which a resumed run samples again."""
        path = Path(args.output_dir) / COMPLETIONS
        if state.is_world_process_zero and path.exists():
            with reading(path, "replies with a step on each line; remove this file"):
                lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
                kept = [line for line in lines if json.loads(line)["step"] <= state.global_step > 0]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        policy: LanguagePolicy = self.trainer.policy()
        with self.trainer.accelerator.autocast():
            replies = generate_texts(policy, [turns for turns, _ in self.prompts])
        rows = [
            {"step": state.global_step, "prompt": "\n\n".join(turn.content for turn in turns), "reply": reply.text}
            | {"logged": logged}
            for (turns, logged), (reply,) in zip(self.prompts, replies, strict=True)
        ]
        path = Path(args.output_dir) / COMPLETIONS
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.trainer.display.show_texts(rows)
        self._report(args.report_to, state.global_step, rows)

    def _report(self, trackers: Sequence[str], step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Send the replies to those trackers of the run that take texts."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = "\n\n".join(f"> {row['prompt']}\n\n{row['reply']}" for row in rows)
                callback.tb_writer.add_text("completions", text, step)
        for name in set(TABLES) & set(trackers):
            import pandas

            tracker = import_module(name)
            tracker.log({"completions": tracker.Table(dataframe=pandas.DataFrame(rows))})
