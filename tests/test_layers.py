"""The rule of dependence: a module imports from a lower rank or its own folder; tasks and algorithms not even that."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANKS = {
    "errors": 0,
    "renamed": 2,
    "settings": 1,
    "shipped": 3,
    "ops": 0,
    "logs": 1,
    "tokens": 2,
    "decoding.distribution": 0,  # it imports torch alone, so that models may read the formula and exports contain it
    "models": 3,
    "decoding": 4,
    "environments": 5,
    "training": 5,
    "tasks": 6,
    "algorithms": 6,
    "run_folder": 7.5,  # above evaluation: a training may be measured while it runs
    "run": 7.6,
    "evaluation": 7,
    "export": 8,
    "comparison": 8,
    "cli": 9,
}
SIBLINGS_APART = ("tasks", "algorithms")  # a module there imports no other of its folder
HIGHEST_RANK_FOR_DATA_PREP = RANKS["tasks"]
LAZY = (
    "fastapi",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "peft",
    "starlette",
    "uvicorn",
)  # extras, and what only the report page needs


def project_sources() -> dict[str, str]:
    """Dotted module name -> source, for everything that is installed."""
    files = [path for package in ("offline_lmrl", "data_prep") for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return {name: path.read_text() for name, path in zip(names, files, strict=True)}


def imports_of(name: str, sources: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """(imported module, at module level?) for every import anywhere in the module and each dotted name in a string."""
    tree = ast.parse(sources[name])
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        top_level = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, top_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = any(other.startswith(name + ".") for other in sources)
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                member = f"{base}.{alias.name}"
                yield (member if member in sources else base), top_level
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Tables of lazily loaded parts name them as "package.module:attribute".
            if match := re.fullmatch(r"([a-z_]\w*(?:\.\w+)+)(?::\w+)+", node.value):
                yield match[1], False


def layer(module: str) -> str:
    """The part of the project that a module belongs to: offline_lmrl.logs.io -> logs, offline_lmrl.run -> run.

    A module with a rank of its own is a part of its own.
    """
    root, _, rest = module.partition(".")
    if root != "offline_lmrl":
        return root
    return rest if rest in RANKS else rest.partition(".")[0]


def violations(sources: Mapping[str, str]) -> list[str]:
    found = []
    for name in sources:
        own = layer(name)
        for target, top_level in imports_of(name, sources):
            other = layer(target)
            if other not in {"data_prep", *RANKS} or target.partition(".")[0] not in {"offline_lmrl", "data_prep"}:
                continue
            if other == "data_prep":
                allowed = own == "data_prep" or (own == "cli" and not top_level)
            elif own == "data_prep":
                allowed = RANKS[other] <= HIGHEST_RANK_FOR_DATA_PREP
            elif own == other and own in SIBLINGS_APART:
                allowed = f"offline_lmrl.{own}" in (name, target)
            else:
                allowed = own == other or RANKS.get(own, -1) > RANKS[other]
            if not allowed:
                found.append(f"{name} imports {target}")
    return found


def test_modules_import_lower_ranks_only():
    assert violations(project_sources()) == []


def test_every_module_has_a_rank():
    known = {"", "data_prep", *RANKS}
    assert [name for name in project_sources() if layer(name) not in known] == []


def test_ops_needs_torch_alone():
    sources = project_sources()
    foreign = {
        f"{name} imports {target}"
        for name in sources
        if layer(name) == "ops"
        for target, _ in imports_of(name, sources)
        if target.partition(".")[0] not in {"torch", *sys.stdlib_module_names} and layer(target) != "ops"
    }
    assert foreign == set()


def test_the_formula_needs_torch_alone_and_none_of_this_project():
    sources = project_sources()
    found = {target.partition(".")[0] for target, _ in imports_of("offline_lmrl.decoding.distribution", sources)}
    assert found - set(sys.stdlib_module_names) == {"torch"}


def test_what_few_commands_need_is_imported_only_where_it_is_used():
    sources = project_sources()
    eager = [
        f"{name} imports {target}"
        for name in sources
        for target, top_level in imports_of(name, sources)
        if target.partition(".")[0] in LAZY and top_level
    ]
    assert eager == []


def test_vllm_is_imported_by_functions_and_by_its_plugin_which_vllm_alone_imports():
    sources, plugin = project_sources(), "offline_lmrl.export.vllm_plugin"
    imports = [(name, *imported) for name in sources for imported in imports_of(name, sources)]
    assert {name for name, target, top_level in imports if target.partition(".")[0] == "vllm" and top_level} == {
        plugin
    }
    assert plugin not in {target for _, target, _ in imports}


def test_the_rule_catches_each_kind_of_violation():
    assert violations({"offline_lmrl.ops.a": "from offline_lmrl.logs import b"})
    assert violations({"offline_lmrl.logs.a": "def f():\n    import offline_lmrl.training"})
    assert violations({"offline_lmrl.logs.a": "from ..models import guided"})
    assert violations({"offline_lmrl.logs.a": "from offline_lmrl.tokens import windows"})
    assert violations({"offline_lmrl.environments.a": "from offline_lmrl.training import loop"})
    assert violations({"offline_lmrl.tasks.a": "from offline_lmrl.algorithms import ilql"})
    assert violations({"offline_lmrl.tasks.maze": "from .walk import Walk", "offline_lmrl.tasks.walk": ""})
    assert violations({"offline_lmrl.algorithms.bc": "from .ilql import loss", "offline_lmrl.algorithms.ilql": ""})
    assert violations({"offline_lmrl.evaluation.a": "from offline_lmrl.cli.main import main"})
    assert violations({"offline_lmrl": "from offline_lmrl.logs.io import read_trajectories"})
    assert violations({"offline_lmrl.cli.data": "import data_prep.maze"})
    assert violations({"offline_lmrl.models.a": "HOME = 'offline_lmrl.evaluation.table:show'"})
    assert violations({"data_prep.maze": "from offline_lmrl.evaluation import metrics"})


def test_the_rule_allows_what_the_design_allows():
    assert not violations({"offline_lmrl.models.a": "from offline_lmrl.models.b import c\nfrom . import d"})
    assert not violations({"offline_lmrl.algorithms": "ALGORITHMS = {'bc': 'offline_lmrl.algorithms.bc:Config'}"})
    assert not violations({"offline_lmrl.cli.data": "def prepare():\n    import data_prep.maze"})
    assert not violations({"offline_lmrl.cli.parser": "from offline_lmrl.evaluation import table"})
    assert not violations({"data_prep.maze": "from offline_lmrl.tasks.maze import Maze"})
