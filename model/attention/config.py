"""The options of each attention backend: the fields of `configs/attention/*.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

SDPA_KERNELS = ("flash", "cudnn", "efficient", "math")


@dataclass
class AttentionConfig:
    """A backend with options of its own subclasses this."""

    name: str


@dataclass
class SdpaConfig(AttentionConfig):
    name: str = "sdpa"
    kernel: str = "auto"
    """auto, flash, cudnn, efficient or math."""

    def __post_init__(self) -> None:
        if self.kernel not in ("auto", *SDPA_KERNELS):
            raise ValueError(f"attention.kernel={self.kernel!r} is unknown; use auto, {', '.join(SDPA_KERNELS)}")


ATTENTIONS: dict[str, type[AttentionConfig]] = {
    "auto": AttentionConfig,
    "flash": AttentionConfig,
    "sdpa": SdpaConfig,
    "flex": AttentionConfig,
    "math": AttentionConfig,
}
