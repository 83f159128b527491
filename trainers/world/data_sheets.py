"""What the data sheets of NVIDIA's GPUs promise. Free of TensorFlow."""

from __future__ import annotations  # launch/doctor.py runs on Python 3.9 too

import re

# Dense 10¹² operations a second: float32 (TF32 where there is one), bfloat16 and float16.
PEAK_TERAFLOPS = {
    "B200": (1100, 2250, 2250),
    "GB200": (1250, 2500, 2500),
    "H200": (495, 989, 989),
    "GH200": (495, 989, 989),
    "H100 PCIe": (378, 756, 756),
    "H100": (495, 989, 989),
    "A100": (156, 312, 312),
    "L40S": (183, 362, 362),
    "L40": (90.5, 181, 181),
    "L4": (60, 121, 121),
    "A10": (62.5, 125, 125),
    "V100": (15.7, 15.7, 125),
    "T4": (8.1, 8.1, 65),
    "RTX 4090": (82.6, 165, 165),
    "RTX 3090": (35.6, 71, 71),
}
PRECISIONS = ("float32", "bfloat16", "float16")
# 10⁹ bytes a second that a GPU sends over all its NVLinks.
NVLINK_GIGABYTES = {"B200": 900, "GB200": 900, "H200": 450, "GH200": 450, "H100": 450, "A100": 300, "V100": 150}


def _known(name: str, cards: dict) -> str | None:
    """The entry that a device's name holds as words of its own: an RTX A1000 is no A100."""
    return next((card for card in cards if re.search(rf"(?<![\w]){re.escape(card)}(?![\w])", name)), None)


def peak_teraflops(name: str, precision: str) -> float | None:
    """Dense 10¹² operations a second of the GPU of this name at a precision; None for one that is not known."""
    card = _known(name, PEAK_TERAFLOPS)
    return None if card is None else float(PEAK_TERAFLOPS[card][PRECISIONS.index(precision)])


def nvlink_gigabytes(name: str) -> float | None:
    """10⁹ bytes a second that the GPU of this name sends over NVLink; None for one that is not known."""
    card = None if "PCIe" in name else _known(name, NVLINK_GIGABYTES)
    return None if card is None else float(NVLINK_GIGABYTES[card])
