"""What `auto` means on this machine, and what is refused before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.precision_config import Float8Config, precision_named
from training import runtime as runtime_module
from training.config import TrainConfig
from training.machine import Gpu
from training.parallel.launch import Launch, local_launch
from training.runtime import Runtime, attention_for, attention_spec, resolve_runtime

CPU = Runtime(None, precision_named("fp32"), False)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0))
T4 = Gpu("Tesla T4", (7, 5))
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "find_gpu", lambda: None)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "find_gpu", lambda: A100)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "find_gpu", lambda: T4)


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("without_gpu")
def test_auto_on_a_cpu_is_fp32_without_compiler(config: MakeConfig) -> None:
    assert resolve_runtime(config("device=auto")) == CPU
    assert resolve_runtime(config("device=cpu")) == CPU
    assert CPU.dtype is torch.float32
    assert CPU.device == torch.device("cpu")


@pytest.mark.usefixtures("ampere")
def test_auto_on_a_gpu_is_compiled_bf16(config: MakeConfig) -> None:
    assert resolve_runtime(config("device=auto")) == Runtime(A100, precision_named("bf16"), True)
    assert resolve_runtime(config("device=cpu")) == CPU, "the CPU is there to be asked for"


@pytest.mark.usefixtures("turing")
def test_auto_on_a_gpu_without_bf16_is_fp32(config: MakeConfig) -> None:
    assert resolve_runtime(config("device=auto")).precision == precision_named("fp32")


@pytest.mark.usefixtures("without_gpu")
def test_what_is_asked_for_is_what_is_done(config: MakeConfig) -> None:
    runtime = resolve_runtime(config("precision=bf16", "compile=true"))
    assert runtime == Runtime(None, precision_named("bf16"), True)
    assert runtime.dtype is torch.bfloat16


@pytest.mark.usefixtures("without_gpu")
def test_cuda_without_a_gpu_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"device=cuda.*use device=cpu"):
        resolve_runtime(config("device=cuda"))


@pytest.mark.usefixtures("without_gpu")
def test_tf32_on_a_cpu_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"precision=tf32.*use precision=fp32"):
        resolve_runtime(config("precision=tf32"))


@pytest.mark.usefixtures("turing")
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_that_the_gpu_lacks_is_refused(config: MakeConfig, precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision={precision}.*use precision=fp32"):
        resolve_runtime(config("device=cuda", f"precision={precision}"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.context=4"], "parallel.context=4 does not divide the 6 processes of this run; use 1, 2, 3, 6"),
        (["parallel=hsdp", "parallel.shards=4"], "parallel.shards=4 does not divide the 6 processes of this run"),
    ],
)
def test_processes_that_cannot_be_arranged_so_are_refused(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
) -> None:
    refused = config(*overrides)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match=says):
        resolve_runtime(refused)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_fp8_of_sharded_weights_is_refused(config: MakeConfig, parallel: str) -> None:
    with pytest.raises(ValueError, match=rf"precision=fp8 .* parallel={parallel} shards; use parallel=data, or prec"):
        resolve_runtime(config("precision=fp8", f"parallel={parallel}"))
    resolve_runtime(config("precision=fp8", "parallel=data"))


def test_more_processes_than_gpus_are_refused(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.runtime.find_gpu", lambda: replace(A100, count=2))
    environment = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "6", "LOCAL_RANK": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"4 processes want a GPU each .* offers 2; use torchrun --nproc-per-node=2"):
        resolve_runtime(config("device=cuda"))


def test_what_is_set_for_ranks_of_this_machine_is_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = local_launch(3)
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1
    for rank, environment in enumerate(environments):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert Launch.here() == Launch(rank, 3, rank, 3, is_launched=True)


def test_autocast_is_on_for_bf16_alone() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32)):
        with Runtime(None, precision_named(precision), False).autocast():
            assert (x @ x).dtype is dtype


def test_a_gpu_that_this_torch_cannot_use_is_an_error_not_a_cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime(A100, precision_named("bf16"), True).device == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"offers NVIDIA A100-SXM4-80GB, but torch .* cannot use it.* use device=cpu"):
        _ = Runtime(A100, precision_named("bf16"), True).device


def test_it_is_found_before_a_backend_touches_the_gpu(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cannot use it"):
        attention_for(
            config("attention=sdpa", "data.document_mask=false"), Runtime(A100, precision_named("bf16"), True)
        )


CANNOT = [
    (["attention=flash"], "attention=flash: .* not on a CPU"),
    (["attention=sdpa", "model.attention_softcap=30"], "softcap=30"),
    (["attention=sdpa", "attention.kernel=cudnn"], "attention.kernel=cudnn"),
]


@pytest.mark.usefixtures("without_gpu", "not_interpreted")
@pytest.mark.parametrize(("overrides", "said"), CANNOT)
def test_an_attention_that_cannot_is_refused_with_a_remedy(config: MakeConfig, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as early:
        resolve_runtime(config(*overrides))
    assert "use " in str(early.value)
    with pytest.raises(ValueError, match=said) as late:
        attention_for(config(*overrides), CPU)
    assert str(early.value) == str(late.value)


@pytest.mark.usefixtures("turing")
def test_the_attention_is_asked_about_the_gpu_that_there_is(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"attention=flash: .* not on sm_75"):
        resolve_runtime(config("device=auto", "attention=flash"))
    spec = attention_spec(config(), Runtime(A100, precision_named("bf16"), True))
    assert (spec.dtype, spec.capability, spec.device) == ("bfloat16", (8, 0), "cuda")


@pytest.mark.parametrize("name", ["math", "sdpa", "flex"])
def test_the_attention_named_is_the_one_built(config: MakeConfig, name: str) -> None:
    assert attention_for(config(f"attention={name}"), CPU).name == name


def test_the_attention_is_told_all_that_the_run_asks_of_it(config: MakeConfig) -> None:
    asked = ["model.window=8", "model.attention_scale=0.5", "model.attention_softcap=20"]
    spec = attention_for(config("attention=math", *asked), CPU, max_documents=3).spec
    assert (spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.seq_len) == (2, 1, 16, 32)
    assert (spec.dtype, spec.capability) == ("float32", None)
    assert (spec.window, spec.scale, spec.softcap, spec.max_documents, spec.causal) == (8, 0.5, 20, 3, True)
    assert attention_for(config("attention=math"), CPU).spec.max_documents == 32, "any bound, where none is known"
    plain = attention_for(config("attention=math", "data.document_mask=false"), CPU, max_documents=3).spec
    assert plain.max_documents is None
    assert plain.is_plain


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (A100, "not NVIDIA A100-SXM4-80GB"),
        (Gpu("NVIDIA L40S", (8, 9)), "not NVIDIA L40S"),
        (Gpu("AMD Instinct MI300X", (9, 4)), "not AMD Instinct MI300X"),
    ],
)
def test_fp8_is_refused_before_hopper(config: MakeConfig, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, said: str) -> None:
    monkeypatch.setattr(runtime_module, "find_gpu", lambda: gpu)
    with pytest.raises(ValueError, match=rf"fp8 needs an NVIDIA GPU from the H100 on, {said}; use precision=bf16"):
        resolve_runtime(config("device=cuda", "precision=fp8"))
    monkeypatch.setattr(runtime_module, "find_gpu", lambda: Gpu("NVIDIA H200", (9, 0)))
    assert resolve_runtime(config("device=cuda", "precision=fp8")).precision == Float8Config()
