"""What cards can do and hold, by name. No torch here: a plan is printed before it loads."""

from __future__ import annotations

import re

from model.memory import GIB

from .machine import Gpu

# Dense matrix-multiply peaks in TFLOP/s as (bf16, fp16, tf32), accumulating in fp32, from the makers' data sheets: the
# sparse figure they print in bold is twice these. None: the card has no such unit. The pattern must match the whole
# name, since a suffix changes the chip: "Laptop GPU", "4090 D", "PCIe", "NVL", "MIG 1g.10gb". Only figures we are
# sure of; a card that is not here has no MFU.
Peaks = tuple[float | None, float | None, float | None]
PEAKS: list[tuple[str, tuple[int, int], Peaks]] = [
    # name (without "NVIDIA" or "AMD"), compute capability, (bf16, fp16, tf32)
    (r"Tesla V100-SXM2.*", (7, 0), (None, 125, None)),
    (r"Tesla V100-PCIE.*", (7, 0), (None, 112, None)),
    (r"Tesla T4", (7, 5), (None, 65, None)),
    (r"A[18]00-(SXM4|PCIE)-\d+GB|A[18]00 80GB PCIe", (8, 0), (312, 312, 156)),
    (r"A30", (8, 0), (165, 165, 82)),
    (r"A10", (8, 6), (125, 125, 62.5)),
    (r"A40", (8, 6), (149.7, 149.7, 74.8)),
    (r"RTX A6000", (8, 6), (154.8, 154.8, 77.4)),
    # GeForce: half the rate that fp16 accumulation would give
    (r"GeForce RTX 3090", (8, 6), (71, 71, 35.6)),
    (r"GeForce RTX 4090", (8, 9), (165.2, 165.2, 82.6)),
    (r"GeForce RTX 5090", (12, 0), (209.5, 209.5, 104.8)),
    (r"RTX 6000 Ada Generation", (8, 9), (364.2, 364.2, 182.1)),
    (r"L4", (8, 9), (121, 121, 60)),
    (r"L40", (8, 9), (181, 181, 90.5)),
    (r"L40S", (8, 9), (362, 362, 183)),
    (r"H[18]00( SXM5)? \d+GB HBM3", (9, 0), (989.4, 989.4, 494.7)),
    (r"H100 PCIe", (9, 0), (756, 756, 378)),
    (r"H100 NVL", (9, 0), (835, 835, 417.5)),
    (r"H200", (9, 0), (989.4, 989.4, 494.7)),
    (r"H200 NVL", (9, 0), (835, 835, 417.5)),
    (r"GH200 (120GB|480GB|144G HBM3e)", (9, 0), (989.4, 989.4, 494.7)),
    (r"H20", (9, 0), (148, 148, 74)),
    (r"B200", (10, 0), (2250, 2250, 1125)),
    (r"GB200", (10, 0), (2500, 2500, 1250)),
    (r"B300( SXM6 AC)?", (10, 3), (2250, 2250, 1125)),
    (r"Instinct MI250X", (9, 0), (191.5, 191.5, None)),  # a device is one of the card's two dies
    (r"Instinct MI300X", (9, 4), (1307.4, 1307.4, 653.7)),
    (r"Instinct MI325X", (9, 4), (1307.4, 1307.4, 653.7)),
    (r"Instinct MI355X", (9, 5), (2516.6, 2516.6, None)),
]

# What `gpu=` of scripts.plan may name. Memory as PyTorch reports it, which is not what the name says.
CARDS = {
    "h200": Gpu("NVIDIA H200", (9, 0), int(139.8 * GIB)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), int(79.2 * GIB)),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), int(79.2 * GIB)),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), int(39.4 * GIB)),
    "l40s": Gpu("NVIDIA L40S", (8, 9), int(44.4 * GIB)),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), int(23.5 * GIB)),
    "rtx-3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), int(23.6 * GIB)),
}


LINKS = {
    "h200": 450e9,
    "h100": 450e9,
    "a100-80gb": 300e9,
    "a100-40gb": 300e9,
    "l40s": 32e9,
    "rtx-4090": 32e9,
    "rtx-3090": 32e9,
}
"""Bytes a second, each way, between two GPUs of a node by the makers' data sheets: NVLink, or PCIe 4 x16."""


def peak_tflops(name: str, factors: str, capability: tuple[int, int] | None = None) -> float | None:
    """Dense matrix-multiply peak of a card in TFLOP/s; None where we are not sure: no MFU is better than a wrong one.

    name as torch.cuda.get_device_name gives it. factors: what is multiplied: bfloat16, float16, tf32, or float8_e4m3fn:
    from Hopper on twice bfloat16 on all of NVIDIA's cards here. float32 gives None: such products do not use the tensor
    cores. A capability that is not the named card's gives None: a virtual or emulated card may borrow a name.
    """
    name = re.sub(r"^(NVIDIA|AMD) ", "", name.strip())
    if factors == "float8_e4m3fn":
        peak = None if name.startswith("Instinct") else peak_tflops(name, "bfloat16", capability)
        is_hopper = any(re.fullmatch(pattern, name) and known >= (9, 0) for pattern, known, _ in PEAKS)
        return 2 * peak if peak and is_hopper else None
    order = ("bfloat16", "float16", "tf32")
    for pattern, known_capability, peaks in PEAKS:
        if re.fullmatch(pattern, name) and capability in (None, known_capability) and factors in order:
            return peaks[order.index(factors)]
    return None
