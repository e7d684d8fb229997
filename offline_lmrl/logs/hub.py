"""One question to the hub before a library loads from it.

Libraries ask for a file of a repository up to six times, with pauses, so that a mistyped path would take half a minute
to be refused.
"""

import os
from pathlib import Path

from offline_lmrl.errors import InputError, first_line


def ask_hub(name: str | Path, what: str, file: str) -> None:
    """Check that a folder or hub name can be opened: a folder exists, or the hub has the repository.

    The hub is asked once. It is not asked if the name is a path on this machine or if the repository is in the cache,
    from which libraries load it without a network.

    Args:
      name: the folder or hub name.
      what: "model", "tokenizer" or "dataset", for the message.
      file: a file of such a repository, in which its existence is asked for.
    Raises: InputError if there is no such folder and no such repository, or if the hub cannot be reached.
    """
    name = str(name)
    if os.path.exists(name):
        return

    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        is_path = "/" in name and Path(name).parent.exists()
    except HFValidationError:
        is_path = True
    if is_path:
        raise InputError(f"{name}: found no such folder, expected the folder or hub name of a {what}")
    kind = "dataset" if what == "dataset" else "model"
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).exists():
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind))
    except EntryNotFoundError:  # the repository is there; the library will say which file it lacks
        return
    except Exception as error:  # no network, no such repository, no permission
        raise InputError(
            f"{name}: found no such folder, and no {what} of that name could be loaded from the hub "
            f"({first_line(error)}), expected one of them"
        ) from error
