"""Several engines of vLLM in one process, which takes a minute to start: python -m tests.engines.player JOBS ANSWERS.

JOBS is JSON, by name: {"engine": arguments of LLM, "batches": [what `Engine.play` takes]}. ANSWERS gets one line per
job, [name, replies of each batch, seconds that each took], or [name, the error, []] if the engine does not start or a
batch is not played.
"""

import gc
import json
import sys
import time
from pathlib import Path

from vllm.distributed import cleanup_dist_env_and_memory

from offline_lmrl.export.vllm_play import Engine


def answer(job):
    replies, seconds = [], []
    try:
        engine = Engine(job["engine"])
        for batch in job["batches"]:
            start = time.perf_counter()
            replies.append(engine.play(**batch))
            seconds.append(time.perf_counter() - start)
        return replies, seconds
    except Exception as error:
        return f"{type(error).__name__}: {error}", []
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    with open(sys.argv[2], "w") as answers:
        for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
            print(json.dumps([name, *answer(job)]), file=answers, flush=True)
