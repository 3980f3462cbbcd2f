"""The table of peaks, and the facts a run records about its machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from training.facts import mixed_peak
from training.hardware import describe_device, git_commit, peak_flops, versions


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peak_is_the_dense_bf16_figure_of_that_very_card(name: str, tera: float) -> None:
    assert peak_flops(name, "bfloat16") == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Some Future Card B2000",
    ],
)
def test_an_unknown_card_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None


def test_peak_depends_on_the_dtype() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("Tesla V100-SXM2-32GB", "float16") == 125e12
    assert peak_flops("Tesla V100-SXM2-32GB", "bfloat16") is None, "Volta has no bf16"
    assert peak_flops("NVIDIA H200", "float64") is None, "not in the table"
    assert peak_flops("NVIDIA H200", "float32") is None, "not the tensor cores' work"


def test_a_capability_that_is_not_the_cards_gives_none() -> None:
    assert peak_flops("NVIDIA H200", "bfloat16", (9, 0)) == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H200", "bfloat16", (8, 0)) is None


def test_describe_device_on_the_cpu() -> None:
    facts = describe_device("cpu")
    assert facts["device"] == "cpu"
    assert facts["name"]
    assert facts["processors"] >= 1


def test_versions_name_what_is_installed() -> None:
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "hydra-core"} <= set(found)
    assert all(isinstance(value, str) for value in found.values())


def test_git_commit_says_dirty_and_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_commit(tmp_path) is None
    assert git_commit(tmp_path / "missing") is None

    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    clean = git_commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "new.py").write_text("1")
    assert git_commit(tmp_path) == clean + "+dirty"

    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None


def test_a_commit_of_another_repository_is_never_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    ours, others, copy = tmp_path / "ours", tmp_path / "others", tmp_path / "others" / "a copy of the sources"
    for folder in (ours, copy):
        folder.mkdir(parents=True)
    for folder, message in ((ours, "ours"), (others, "another")):
        for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", message]):
            subprocess.run(["git", "-C", str(folder), *command], check=True)
    assert git_commit(copy) is None, "the enclosing repository's"
    commit = git_commit(ours)
    monkeypatch.setenv("GIT_DIR", str(others / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(others))
    assert git_commit(ours) == commit
    assert git_commit(copy) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 2 * 989.4),
        ("NVIDIA B200", 4500),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_fp8_has_twice_the_peak_of_bf16_where_it_is_used(name: str, tera: float | None) -> None:
    assert peak_flops(name, "float8_e4m3fn") == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_step_partly_in_fp8_is_held_against_both_peaks() -> None:
    """8 units of work of which 6 at twice the rate: 2 + 3 units of time."""
    assert mixed_peak(8.0, 6.0, 1.0, 2.0) == pytest.approx(8 / 5)
    assert mixed_peak(8.0, 0.0, 1.0, 2.0) == 1.0
    assert mixed_peak(8.0, 8.0, 1.0, 2.0) == 2.0
