"""Play prompts in vLLM, in an environment of its own: python -m offline_lmrl.export.vllm_play.

The first line of stdin is a JSON object with the arguments of vLLM's LLM; each further line is an object with

    prompts    lists of token ids
    sampling   fields of vLLM's SamplingParams, one object per prompt

and is answered by one line on stdout: the token ids of each reply, with the one that ends it. All that vLLM writes
goes to stderr.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Engine:
    """A vLLM engine in this process.

    Args:
      arguments: those of vLLM's LLM.
    """

    def __init__(self, arguments: Mapping[str, Any]):
        from vllm import LLM

        self.llm = LLM(**arguments)

    def play(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Reply to prompts, given as token ids; `sampling` holds the fields of SamplingParams for each."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.llm.generate(asked, [SamplingParams(**one) for one in sampling], use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine = Engine(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(engine.play(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
