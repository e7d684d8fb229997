"""Several jobs of offline_lmrl.export.vllm_play in one process: a start of vLLM takes a minute, an engine seconds.

A job's entry "refused" holds the error, if the engine does not start or a batch is not played.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

from vllm.distributed import cleanup_dist_env_and_memory

from offline_lmrl.export.vllm_play import play


def played(job):
    try:
        return {"batches": play(job)}
    except Exception:
        return {"refused": traceback.format_exc()}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: played(job) for name, job in jobs.items()}))
