"""The hub is asked once for a name, and never for a path."""

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from offline_lmrl.errors import InputError
from offline_lmrl.logs.hub import ask_hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The questions that reached the hub; the entry None of the list is the error that it answers with."""
    questions, answer = [], {}

    def get_hf_file_metadata(url):
        questions.append(url)
        if "error" in answer:
            raise answer["error"]

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return questions, answer


@pytest.mark.parametrize("name", ["./nowhere", "/x/y", "../up", "runs/mine", "a/b/c", "~/run", ".", ""])
def test_a_path_is_not_asked_for(name, asked, tmp_path):
    (tmp_path / "runs").mkdir()
    if name == ".":
        ask_hub(name, "model", "config.json")  # it exists
    else:
        with pytest.raises(InputError, match="found no such folder, expected the folder or hub name of a model"):
            ask_hub(name, "model", "config.json")
    assert asked[0] == []


def test_a_name_is_asked_for_once_and_the_answer_is_one_line(asked):
    questions, answer = asked
    ask_hub("owner/there", "model", "config.json")
    answer["error"] = httpx2.ConnectError("no network\nat all")
    with pytest.raises(
        InputError, match=r"^owner/name: found no such folder, and no model .* \(no network\), expected"
    ):
        ask_hub("owner/name", "model", "config.json")
    assert questions == [
        "https://huggingface.co/owner/there/resolve/main/config.json",
        "https://huggingface.co/owner/name/resolve/main/config.json",
    ]


def test_a_repository_without_that_file_is_there(asked):
    asked[1]["error"] = EntryNotFoundError("no such file")
    ask_hub("owner/name", "dataset", "README.md")
    assert asked[0] == ["https://huggingface.co/datasets/owner/name/resolve/main/README.md"]


def test_an_unknown_repository_is_refused(asked):
    asked[1]["error"] = RepositoryNotFoundError(
        "401", response=httpx2.Response(401, request=httpx2.Request("HEAD", "/"))
    )
    with pytest.raises(InputError, match="gpt3: found no such folder, and no tokenizer of that name"):
        ask_hub("gpt3", "tokenizer", "tokenizer_config.json")


def test_a_repository_in_the_cache_needs_no_network(asked, tmp_path):
    (tmp_path / "cache" / "models--owner--name").mkdir(parents=True)
    ask_hub("owner/name", "model", "config.json")
    assert asked[0] == []
