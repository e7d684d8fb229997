"""The shipped configs, which commands take by name in place of a file."""

from pathlib import Path

from offline_lmrl.errors import InputError
from offline_lmrl.renamed import CONFIGS
from offline_lmrl.settings import nearest


def shipped_configs() -> dict[str, Path]:
    """Return "task/method" -> file of all shipped configs.

    Their folder configs/ is inside an installed package, and next to the package in a clone of the repository.
    """
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def config_path(name: str) -> str:
    """Return the path of a config file.

    Args:
      name: a path, or the name "task/method" of a shipped config.
    Raises: InputError if it is neither.
    """
    is_path = Path(name).exists() or name.endswith((".yaml", ".yml"))
    return name if is_path else str(shipped_config(name))


def shipped_config(name: str) -> Path:
    """Return the file of the shipped config "task/method". Raises: InputError if there is none."""
    name, shipped = CONFIGS.get(name, name), shipped_configs()
    if name not in shipped:
        raise InputError(
            f"{name}: found neither a file nor a shipped config of that name (`offline-lmrl config` lists them)"
            f"{nearest(name, shipped)}"
        )
    return shipped[name]
