"""In what numbers a run computes: the fields of `configs/precision/*.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import ModelConfig, linear_sizes

DTYPES = ("float32", "bfloat16")
MULTIPLE = 16
"""Of which both sizes of a weight must be one, for products in fp8 to read it."""


@dataclass
class PrecisionConfig:
    """Matrix products in what `name` says: bf16, TF32 or float32; the rest in float32, unless a field says so."""

    name: str = "auto"
    residual: str = "float32"
    """The dtype of the residual stream: float32 or bfloat16."""
    moments: str = "float32"
    """The dtype in which the optimizer's moments are kept from step to step: float32 or bfloat16."""
    reduction: str = "float32"
    """The dtype in which gradients are added up over processes: float32 or bfloat16."""

    def __post_init__(self) -> None:
        for field in ("residual", "moments", "reduction"):
            if getattr(self, field) not in DTYPES:
                raise ValueError(f"precision.{field}={getattr(self, field)} is not possible; use {' or '.join(DTYPES)}")
        if self.residual == "bfloat16" and self.name in ("tf32", "fp32"):
            raise ValueError(
                f"precision.residual=bfloat16 rounds more than the products of precision={self.name} do; "
                f"use precision=bf16-residual, or precision.residual=float32"
            )

    def decided(self, name: str) -> PrecisionConfig:
        """What `auto` means where `name` was chosen for it.

        Raises:
            ValueError: the other fields do not go with it.
        """
        return replace(self, name=name)

    def check_model(self, model: ModelConfig) -> None:
        """Raises ValueError where this model has nothing that could be computed so."""

    @property
    def product_bytes(self) -> int:
        """Of a number in attention, and in a matrix product unless that is in fp8."""
        assert self.name != "auto"
        return 4 if self.name in ("tf32", "fp32") else 2

    @property
    def residual_bytes(self) -> int:
        """Of a number in the residual stream."""
        return 2 if self.residual == "bfloat16" else 4

    @property
    def moment_bytes(self) -> int:
        return 2 if self.moments == "bfloat16" else 4


@dataclass
class ResidualConfig(PrecisionConfig):
    """bf16, in the residual stream, too."""

    name: str = "bf16-residual"
    residual: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual != "bfloat16":
            raise ValueError(f"precision.residual={self.residual} with precision=bf16-residual; use precision=bf16")


@dataclass
class Float8Config(PrecisionConfig):
    """bf16, and the products of the blocks' linear layers in fp8: `model.float8`."""

    name: str = "fp8"
    scaling: str = "tensorwise"
    """tensorwise: one scale for each tensor; rowwise: one for each row of a factor."""
    weight_gradients: str = "fp8"
    """The dtype of the factors of weight gradients: fp8 or bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling not in ("tensorwise", "rowwise"):
            raise ValueError(f"precision.scaling={self.scaling} is not possible; use tensorwise or rowwise")
        if self.weight_gradients not in ("fp8", "bfloat16"):
            raise ValueError(f"precision.weight_gradients={self.weight_gradients} is not possible; use fp8 or bfloat16")

    def check_model(self, model: ModelConfig) -> None:
        sizes = linear_sizes(model)
        if not any(map(is_in_fp8, sizes.values())):
            said = ", ".join(f"{name} {i} → {o}" for name, (i, o) in sizes.items())
            raise ValueError(
                f"precision=fp8 needs layers whose sizes are multiples of {MULTIPLE}, and {model.name} has none "
                f"({said}); use precision=bf16"
            )


def is_in_fp8(sizes: tuple[int, int]) -> bool:
    """Whether a linear layer with so many inputs and outputs can multiply in fp8."""
    return all(size % MULTIPLE == 0 for size in sizes)


def described(asked: PrecisionConfig, decided: PrecisionConfig, model: ModelConfig, emulated: bool) -> str:
    """For the start-up line.

    Args:
        asked: what may be auto. decided: what it is here. emulated: whether products in fp8 are computed in float32.
    """
    said = [f"residual stream {decided.residual}, moments {decided.moments}"]
    if isinstance(decided, Float8Config):
        sizes = linear_sizes(model)
        chosen = [name for name, size in sizes.items() if is_in_fp8(size)]
        said.insert(0, f"{', '.join(chosen)} of each block, scaled {decided.scaling}{', emulated' if emulated else ''}")
        if left := [f"{name} ({i} → {o})" for name, (i, o) in sizes.items() if name not in chosen]:
            said.insert(1, f"in bf16, for want of multiples of {MULTIPLE}, {', '.join(left)}")
    is_auto = " (auto)" if asked.name == "auto" else ""
    return f"{decided.name}{is_auto}: {'; '.join(said)}"


PRECISIONS: dict[str, type[PrecisionConfig]] = {
    "auto": PrecisionConfig,
    "bf16": PrecisionConfig,
    "bf16-residual": ResidualConfig,
    "fp8": Float8Config,
    "tf32": PrecisionConfig,
    "fp32": PrecisionConfig,
}


def precision_named(name: str) -> PrecisionConfig:
    """The option with its defaults."""
    return PRECISIONS[name](name=name)
