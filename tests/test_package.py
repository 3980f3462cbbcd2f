"""The package `flash_gpt`: what it needs, what wheel and source distribution hold, and that it works alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_library_needs_torch_and_triton_only():
    assert [line.split(">=")[0] for line in PROJECT["dependencies"]] == ["torch", "triton"]


def test_the_kernels_import_torch_triton_and_the_standard_library_only():
    """Hugging Face's transformers alone is imported besides, by the function that registers with it."""
    found = {
        (file.name, module.split(".")[0])
        for file in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        for module in imported(node)
    }
    others = {(file, name) for file, name in found if name not in sys.stdlib_module_names | {"torch", "triton"}}
    assert others == {("transformers.py", "transformers")}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {kernels.__version__}\n" in citation


def test_every_extra_that_the_pins_serve_is_pinned():
    pins = (ROOT / "constraints.txt").read_text("utf-8").lower()
    for extra in ("train", "tensorboard", "dev", "docs"):
        for line in PROJECT["optional-dependencies"][extra]:
            name = line.split(">=")[0].lower()
            assert name.startswith("flash-gpt[") or f"\n{name}==" in pins, f"{name} of the extra {extra}"


def test_without_the_extra_the_trainer_says_in_one_line_what_to_install():
    find = "import importlib.util as u; real = u.find_spec; u.find_spec = lambda x: None if x == 'hydra' else real(x)"
    script = "import runpy, sys; sys.modules['hydra'] = None; runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", f"{find}; {script}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    remedy = "pip install -c constraints.txt -e '.[train]'"
    assert done.stderr == f"error: hydra not installed: the trainer's packages are an extra; {remedy}\n"


@pytest.mark.slow
def test_wheel_and_source_distribution_hold_the_library_and_it_works_alone(tmp_path):
    """In a fresh environment, from another folder: with its two dependencies, and without Triton."""
    folder, environment = tmp_path / "dist", tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    elsewhere = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def run(*command: object, **variables: str) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=elsewhere | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", "build")
    source = tmp_path / "source"  # a build leaves folders behind
    run("git", "clone", "--quiet", ROOT, source)
    run(python, "-m", "build", "--outdir", folder, source)  # the wheel is made from the source distribution
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")

    modules = {str(file.relative_to(source / "kernels")) for file in (source / "kernels").rglob("*.py")} | {"py.typed"}
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(held) == {f"flash_gpt/{name}" for name in modules}
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith("flash_gpt.egg-info/")}
    others = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "docs/library.md", "pyproject.toml", "setup.cfg"}
    assert names == others | {f"kernels/{name}" for name in modules}

    run(python, "-m", "pip", "install", "--quiet", "-c", source / "constraints.txt", wheel)
    installed = run(python, "-m", "pip", "list", "--format", "freeze").lower().split()
    assert not {line.split("==")[0] for line in installed} & {"hydra-core", "datasets", "wandb", "tokenizers", "rich"}

    use = """
import flash_gpt, torch
q = torch.randn(1, 20, 2, 16)
print(flash_gpt.__version__, flash_gpt.attention(q, q, q).shape)
try:
    print(flash_gpt.flash_attention(q, q, q).shape)
except ValueError as error:
    print(error)
"""
    shape = "torch.Size([1, 20, 2, 16])"
    first = f"{kernels.__version__} {shape}\n"
    refused = run(python, "-c", use)
    assert refused.startswith(first + "flash_attention runs on CUDA GPUs, not on CPU tensors; use flash_gpt.attention")

    # Triton's interpreter needs NumPy.
    run(python, "-m", "pip", "install", "--quiet", "-c", source / "constraints.txt", "numpy")
    assert run(python, "-c", use, TRITON_INTERPRET="1") == first + shape + "\n"

    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "triton")
    refused = run(python, "-c", use)
    assert refused.startswith(first + "flash_attention needs Triton, which is not installed (pip install triton")
    assert refused.count("\n") == 2
