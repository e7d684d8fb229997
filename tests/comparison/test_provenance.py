import json
import platform
import sys

from offline_lmrl.comparison import provenance as module


def test_it_names_versions_and_the_command_but_not_the_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/offline-lmrl", "compare", "a file.yaml"])
    found = module.provenance.__wrapped__()
    assert found["command"] == "offline-lmrl compare 'a file.yaml'"
    assert {"offline_lmrl", "python", "torch", "transformers"} <= set(found["versions"])
    assert platform.node() not in json.dumps(found)


def test_the_commit_is_that_of_a_checkout_which_tracks_this_code(monkeypatch):
    said = {"ls-files": "provenance.py", "describe": "0a1b-dirty"}
    monkeypatch.setattr(module, "_git", lambda folder, command, *rest: said.get(command))
    assert module._commit() == "0a1b-dirty"
    said.pop("ls-files")  # installed somewhere inside another checkout
    assert module._commit() is None


def test_a_missing_git_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._commit() is None
