"""Plant faults one at a time in a copy of a checkout and show that a test catches each: `faults.py [CHECKOUT]`.

Run before and after a change of words and places: the tests then still test what they did. A fault is a text that
stands once in the package and what it becomes; the tests are those that should fail, by file. Prints a line per fault
and ends with exit code 1 if one was not caught.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "the advantage has the wrong sign",
        "torch.maximum(-advantage * ratio, -advantage * ratio.clamp(",
        "torch.maximum(advantage * ratio, advantage * ratio.clamp(",
        "test_policy_gradient.py",
    ),
    Fault(
        "advantages run on into the next episode",
        "torch.where(_is_last(episode), 0.0,",
        "torch.where(_is_last(episode) & False, 0.0,",
        "test_policy_gradient.py",
    ),
    Fault(
        "the penalty of KL is a reward",
        "(reward - kl_weight * kl)",
        "(reward + kl_weight * kl)",
        "test_policy_gradient.py",
    ),
    Fault(
        "a terminal action bootstraps",
        "reward + discount * bootstrap * next_v",
        "reward + discount * next_v",
        "test_value_learning.py",
    ),
    Fault(
        "the expectile is that of the other side",
        "torch.where(error < 0, (1 - expectile) * square, expectile * square)",
        "torch.where(error < 0, expectile * square, (1 - expectile) * square)",
        "test_value_learning.py",
    ),
    Fault("V's loss reaches the target", "target_q.detach() - v", "target_q - v", "test_value_learning.py"),
    Fault(
        "the conservative term has the wrong sign",
        "(logsumexp_q - q).sum(0)",
        "(q - logsumexp_q).sum(0)",
        "test_value_learning.py",
    ),
    Fault(
        "λ mixes the wrong way",
        "((1 - mix) * next_v[:, t] + mix * following)",
        "(mix * next_v[:, t] + (1 - mix) * following)",
        "test_returns.py",
    ),
    Fault(
        "a preference is for the other option",
        "-(prob * _log_sigmoid(lead, error_rate) + (1 - prob) * _log_sigmoid(-lead, error_rate))",
        "-(prob * _log_sigmoid(-lead, error_rate) + (1 - prob) * _log_sigmoid(lead, error_rate))",
        "test_preferences.py",
    ),
    Fault(
        "guidance turns away from value",
        "return self.beta * advantage",
        "return -self.beta * advantage",
        "test_distribution.py",
    ),
    Fault("the larger of two heads counts", "return q.amin(0)", "return q.amax(0)", "test_distribution.py"),
    Fault(
        "guidance by returns is one too small",
        "(1.0 + scale) / divisor(temperature)",
        "scale / divisor(temperature)",
        "test_distribution.py",
    ),
    Fault(
        "a row draws the same number at every token",
        "_mix(_mix(seed + golden) + counter * golden)",
        "_mix(_mix(seed + golden) + golden)",
        "test_decoding.py",
    ),
    Fault(
        "targets are never updated",
        "torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)",
        "pass",
        "test_value_heads.py",
    ),
    Fault(
        "a state is one token early",
        "(RowKind.OWN, opening + k + 1)",
        "(RowKind.OWN, opening + k)",
        "test_episodes.py",
    ),
    Fault(
        "what is asked for does not fall with what was earned",
        "(now - (r or 0.0)) / self.discount_per_turn",
        "now / self.discount_per_turn",
        "test_conditioning.py",
    ),
    Fault(
        "a scale is undone without its shift",
        "return total * self.scale + (self.scored_turns - scored_before) * self.shift",
        "return total * self.scale",
        "test_scale.py",
    ),
    Fault(
        "a loss is averaged over the micro-batch",
        "* self.args.world_size / num_items_in_batch",
        "* self.args.world_size / len(per_item)",
        "training/test_trainer.py",
    ),
    Fault(
        "the caches of rows that join are aligned to the left",
        "place[:, :, empty:width] = states",
        "place[:, :, : width - empty] = states",
        "test_loop.py",
    ),
    Fault(
        "a row that joins a batch takes the random numbers of its first tokens again",
        "row.request.counter + row.before",
        "row.request.counter",
        "test_loop.py",
    ),
    Fault(
        "support is judged at the temperature that is asked for",
        "support_filter(_at_least_float32(logits), form.support)",
        "support_filter(_at_least_float32(logits) / (form.temperature or 1.0), form.support)",
        "test_distribution.py",
    ),
    Fault(
        "intervals forget that seeds differ",
        "variance = max(a + b - self._residual(), a, b)",
        "variance = b",
        "test_metrics.py",
    ),
)


def plant(folder: Path, fault: Fault) -> Path:
    """Write the fault into the one file of the package that holds its text; return that file."""
    holders = [file for file in sorted((folder / "offline_lmrl").rglob("*.py")) if fault.old in file.read_text()]
    if len(holders) != 1 or holders[0].read_text().count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: found {len(holders)} files with {fault.old!r}, expected it once in one")
    holders[0].write_text(holders[0].read_text().replace(fault.old, fault.new))
    return holders[0]


def caught_by(folder: Path, tests: str) -> str | None:
    """The first test of these files that fails; None if all pass."""
    files = [str(file) for file in sorted((folder / "tests").rglob(tests))]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1) or done.returncode == 1 and not failed:
        raise SystemExit(f"{tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[0].split(" - ")[0] if failed else None


def main(checkout: Path) -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        for name in ("offline_lmrl", "data_prep", "tests", "configs", "pyproject.toml", "setup.cfg", "README.md"):
            source = checkout / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        for tests in sorted({fault.tests for fault in FAULTS}):
            if broken := caught_by(folder, tests):
                raise SystemExit(f"without any fault: {broken}")
        for fault in FAULTS:
            file = plant(folder, fault)
            found = caught_by(folder, fault.tests)
            shutil.copy(checkout / file.relative_to(folder), file)
            missed += found is None
            print(f"{fault.name}: {found or 'NOT CAUGHT'}", flush=True)
    print(f"{len(FAULTS)} faults, {missed} not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()))
