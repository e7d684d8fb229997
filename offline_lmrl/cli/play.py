"""The command `generate`, which lets a run (the folder with a trained model that `train` wrote) reply."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_lmrl.cli.output import check_output
from offline_lmrl.errors import InputError
from offline_lmrl.logs.prompts import read_prompts
from offline_lmrl.logs.terminal import progress_bar, visible
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context, shown, to_record
from offline_lmrl.settings import REQUIRED, setting

if TYPE_CHECKING:
    from offline_lmrl.decoding.policy import LanguagePolicy
    from offline_lmrl.logs.protocols import Policy, Reply

PROMPTS_AT_ONCE = 256  # prompts per call of the sampler; the progress bar moves once for each call


@dataclass(kw_only=True)
class OpenedRun:
    """A run and how it is opened, for the commands that let it reply."""

    run: str = setting(REQUIRED, "Run directory, or folder or hub name of a causal LM.")
    task: str = setting(
        "", 'Name of the task that is played, for a run that was trained with returns per task; "" for other runs.'
    )
    device: str | None = setting(
        None, "Device of the model, such as cpu or cuda:0; null = the first accelerator, else the CPU."
    )
    decoding: dict[str, Any] = setting(dict, "DecodingConfig fields, over those saved with the run.")

    def __post_init__(self) -> None:
        from offline_lmrl.decoding.config import DecodingConfig

        DecodingConfig(**self.decoding)  # reports a number out of range before the model is loaded

    def open(self) -> "LanguagePolicy":
        """Load the run as a policy."""
        from offline_lmrl.decoding.policy import LanguagePolicy

        return LanguagePolicy.load(self.run, device=self.device, task=self.task, **self.decoding)


@dataclass(kw_only=True)
class GenerateConfig(OpenedRun):
    """Reply to prompts, or talk turn by turn (--chat)."""

    prompts: str = setting(
        "-", "File, or - for stdin: one prompt per line, plain text or JSON with `prompt` or `messages`."
    )
    output: str = setting(
        "-",
        "File, or - for stdout. A file holds JSON Lines with the messages and the reply's token ids and "
        "log-probabilities. If a scorer chose the reply, its labels hold the score, the number of replies compared, "
        "and whether it abstained.",
    )
    json: bool | None = setting(
        None, "Print the JSON Lines on stdout too (true), or only text (false); null = text if stdout is a terminal."
    )
    chat: bool = setting(False, "Talk with the run turn by turn on stdin and stdout, until the input ends.")
    n: int = setting(1, "Number of replies to each prompt.")
    seed: int = setting(0, "Seed of the first prompt; the following ones count up from it.")
    scorer: str | None = setting(
        None, "Scorer that chooses the best of several replies, as in `relabel`; null = no choice."
    )
    best_of: int = setting(1, "Number of replies from which the scorer chooses one.")
    threshold: float | None = setting(
        None, "Lowest score at which a reply is given; below it, the run abstains. null = always reply."
    )
    coverage: float | None = setting(
        None,
        "Share of the prompts in held_out that are to be answered, 0 to 1; it sets the threshold. null = `threshold`.",
    )
    held_out: str | None = setting(None, "File of prompts for coverage, in the form of `prompts`; null = none.")
    abstention: str | None = setting(
        None,
        'Text given in place of a reply whose score is below the threshold; null = "I don\'t know.". Such rows are '
        "not trained on: reading drops and counts them.",
    )
    contexts: str | None = setting(
        None,
        "package.module:function (its code runs) that maps the turns so far to several dialogues (lists of turns), "
        "such as one per document to answer from. Replies are sampled from these in turn; the scorer scores them "
        "after the turns so far. null = sample from the turns so far.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is False and self.output != "-":
            raise InputError(f"json: found false with the output {self.output}, expected none: a file is JSON Lines")
        if self.best_of < 1:
            raise InputError(f"best_of: found {self.best_of}, expected at least 1")
        limited = self.threshold is not None or self.coverage is not None
        if self.scorer is None and (self.best_of > 1 or limited or self.contexts is not None):
            raise InputError("scorer: missing, expected one: best_of, threshold, coverage and contexts need it")
        together = (self.coverage is None) == (self.held_out is None)
        if not together or (self.coverage is not None and self.threshold is not None):
            raise InputError(
                f"coverage: found {self.coverage} with held_out {self.held_out} and threshold {self.threshold}, "
                "expected coverage and held_out together, or a threshold"
            )
        if self.abstention is not None and not limited:
            raise InputError(
                f"abstention: found {shown(self.abstention)} alone, expected --threshold or --coverage too"
            )

    def player(self, policy: "LanguagePolicy") -> "Policy":
        """Return the policy, or one that lets the scorer choose among its replies."""
        if self.scorer is None:
            return policy
        from offline_lmrl.decoding.reranking import BestOfN, calibrated_threshold
        from offline_lmrl.decoding.scorers import load_scorer
        from offline_lmrl.logs.protocols import import_object

        reads = None if self.contexts is None else import_object(self.contexts, "contexts")
        instead = {} if self.abstention is None else {"abstention": self.abstention}
        player = BestOfN(policy, load_scorer(self.scorer), self.best_of, self.threshold, contexts=reads, **instead)
        if self.coverage is not None:
            player.threshold = calibrated_threshold(player, read_prompts(self.held_out), self.coverage)
            print(f"threshold: {player.threshold:.6g}", file=sys.stderr)
        return player


def generate(config: GenerateConfig) -> None:
    """Print or write replies of a run to prompts, or talk with it on stdin and stdout."""
    from offline_lmrl.logs.io import write_text

    if config.output != "-":
        check_output(Path(config.output), config.prompts, config.held_out, is_file=True)
    histories = [] if config.chat else read_prompts(config.prompts)
    policy = config.open()
    player = config.player(policy)
    if config.chat:
        _chat(player, config.seed)
        return
    replies = list(_replies(player, policy.renderer.fingerprint, histories, config))
    as_text = config.output == "-" and (sys.stdout.isatty() if config.json is None else not config.json)
    if as_text:
        print(visible("\n\n".join(_texts(replies))))
    else:
        rows = [json.dumps(to_record(row), ensure_ascii=False) + "\n" for row in replies]
        if config.output == "-":
            sys.stdout.writelines(map(visible, rows))  # escapes terminal control characters; the JSON stays the same
        else:
            write_text(config.output, "".join(rows))
    if config.threshold is not None or config.coverage is not None:
        answered = sum(not row.labels["abstained"] for row in replies)
        print(f"answered {answered} of {len(replies)}", file=sys.stderr)


def _replies(
    policy: "Policy", tokenizer: str, histories: Sequence[Sequence[Turn]], config: GenerateConfig
) -> Iterator[Trajectory]:
    """Let the policy reply to each history and yield a trajectory for each reply.

    In the trajectory, only the reply is trainable; if the policy abstained, no turn is trainable.

    Args:
      policy: gives the replies.
      tokenizer: fingerprint of the policy's tokenizer and chat format, stored as the label "tokenizer".
      histories: the turns before each reply.
      config: the number of replies to each history, and the seed of the first.
    """
    from offline_lmrl.decoding.policy import generate_texts

    with progress_bar("generating", len(histories)) as progress:
        for start in range(0, len(histories), PROMPTS_AT_ONCE):
            part = histories[start : start + PROMPTS_AT_ONCE]
            seeds = range(config.seed + start, config.seed + start + len(part))
            texts = generate_texts(policy, part, config.n, seeds)
            for history, own_seed, replies in zip(part, seeds, texts, strict=True):
                yield from (_answered(tokenizer, history, reply, own_seed) for reply in replies)
            progress(start + len(part), len(histories))


def _answered(tokenizer: str, history: Sequence[Turn], reply: "Reply", seed: int) -> Trajectory:
    trainable = False if reply.labels.get("abstained") else None
    turn = Turn("assistant", reply.text, trainable, token_ids=reply.token_ids, behaviour_log_prob=reply.log_prob)
    labels = {"seed": seed, "tokenizer": tokenizer, "policy_log_prob": [list(reply.policy_log_prob or ())]}
    return Trajectory((*as_context(history), turn), terminated=reply.closed, labels=labels | reply.labels)


def _texts(replies: Sequence[Trajectory]) -> list[str]:
    """Return what a person reads of the replies; several replies come each after the turn that they answer."""
    texts = [reply.turns[-1].content for reply in replies]
    if len(replies) == 1:
        return texts
    asked = [reply.turns[-2].content if len(reply.turns) > 1 else "" for reply in replies]
    return [f"> {turn}\n{text}" for turn, text in zip(asked, texts, strict=True)]


def _chat(policy: "Policy", seed: int) -> None:
    """Reply to each line of stdin that is not blank, until the input ends."""
    session, turns = policy.start([seed]), []
    with suppress(EOFError):
        while True:
            text = input("> " if sys.stdin.isatty() else "").strip()
            if text:
                turns.append(Turn("user", text))
                (reply,) = session.reply([0], [turns])
                turns.append(Turn("assistant", reply.text, token_ids=reply.token_ids))
                print(visible(reply.text), flush=True)
