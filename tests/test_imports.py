"""Everything imports, what should stay light does, and what is installed is what the tree holds."""

import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offline_lmrl

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("offline_lmrl", "data_prep")
    for path in (ROOT / package).rglob("*.py")
)


def modules_after(*statements: str) -> set[str]:
    """The third-party packages that a fresh interpreter has loaded after the statements."""
    code = "\n".join(
        [*statements, "import sys; sys.stderr.write(' '.join({m.partition('.')[0] for m in sys.modules}))"]
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stderr.split())


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    if name == "offline_lmrl.export.vllm_plugin":
        pytest.importorskip("vllm")  # which alone imports this module
    importlib.import_module(name)


OLD_NAMES = {"IQLConfig": "AWRConfig", "IQLTrainer": "AWRTrainer"}


@pytest.mark.parametrize("name", offline_lmrl.__all__)
def test_public_name_is_found(name):
    assert getattr(offline_lmrl, name).__name__ == OLD_NAMES.get(name, name)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'offline_lmrl' has no attribute 'Trainer'"):
        offline_lmrl.Trainer  # noqa: B018


def test_importing_the_package_loads_no_library():
    assert not {"torch", "transformers", "datasets", "numpy"} & modules_after("import offline_lmrl")


def test_top_level_help_loads_no_library():
    loaded = modules_after("from offline_lmrl.cli.main import main", "main(['--help'])")
    assert not {"torch", "transformers", "datasets", "numpy"} & loaded


@pytest.mark.parametrize("source", ["maze", "scored", "ultrafeedback"])
def test_the_help_of_a_source_of_data_loads_no_transformers(source):
    loaded = modules_after(
        "from offline_lmrl.cli.main import main",
        "import contextlib",
        "with contextlib.suppress(SystemExit):",
        f"    main(['prepare', '{source}', '--help'])",
    )
    assert not {"transformers", "datasets"} & loaded


def test_ops_load_torch_alone():
    loaded = modules_after(*(f"import {name}" for name in MODULES if name.startswith("offline_lmrl.ops")))
    assert not {"transformers", "datasets", "einops", "accelerate"} & loaded


def test_every_folder_of_modules_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for package in ("offline_lmrl", "data_prep") for path in (ROOT / package).rglob("*.py")}
    in_tree = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup["options"]["packages"].split()) == in_tree | {"offline_lmrl.configs"}


def test_every_file_beside_the_modules_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {package: ROOT / package.replace(".", "/") for package in setup["options"]["packages"].split()}
    folders["offline_lmrl.configs"] = ROOT / "configs"
    installed = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in re.split(r",\s*", patterns.strip())
        for path in folders[package].glob(pattern)
    }
    files = {path for path in (ROOT / "offline_lmrl").rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= installed
