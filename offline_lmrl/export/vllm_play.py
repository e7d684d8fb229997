"""Play prompts in vLLM, in an environment of its own: python -m offline_lmrl.export.vllm_play JOB REPLIES.

JOB is a JSON file:

    {"engine": {"model": FOLDER, ...},                      arguments of vLLM's LLM
     "batches": [{"prompts": [[1, 2], ...],                 token ids
                  "sampling": [{"temperature": 0}, ...]}]}  fields of vLLM's SamplingParams, one per prompt, or one for all

The batches are played one after another by one engine. REPLIES is written with [{"replies": [[3, 4], ...], "seconds":
1.5}], one entry per batch. vLLM writes its own messages to stdout and stderr.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def play(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Play the batches of a job; return the replies of each, as token ids, and the seconds that it took."""
    from vllm import LLM, SamplingParams

    engine, played = LLM(**job["engine"]), []
    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        sampling = batch["sampling"]
        if isinstance(sampling, dict):
            sampling = [sampling] * len(prompts)
        start = time.perf_counter()
        outputs = engine.generate(prompts, [SamplingParams(**one) for one in sampling], use_tqdm=False)
        seconds = time.perf_counter() - start
        played.append({"replies": [list(output.outputs[0].token_ids) for output in outputs], "seconds": seconds})
    return played


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(play(json.loads(Path(sys.argv[1]).read_text()))))
