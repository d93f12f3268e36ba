"""FLOPs of matrix products in a compiled program, each for one run."""

import math
import re
from collections.abc import Iterator

import numpy as np

from grok.plan.hlo import Computation, Instruction
from grok.plan.kernels import kernel_flops


def flops(inside: Computation, one: Instruction) -> float:
    """Two for every product and sum of a matrix product; of a kernel, what is known of it."""
    if one.opcode == "dot":
        left = inside[one.operands[0]].arrays[0]
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        contracted = [int(n) for n in found[1].split(",") if n] if found else []
        return 2 * math.prod(one.arrays[0].shape) * math.prod(left.shape[d] for d in contracted)
    if one.opcode == "convolution":
        return _convolution_flops(inside, one)
    if one.opcode == "custom-call":
        return kernel_flops(inside, one)
    return 0.0


def _convolution_flops(inside: Computation, one: Instruction) -> float:
    """What a convolution multiplies, not counting where a window lies over padding or holes.

    TPU programs have all matrix products as convolutions; dimensions of a batch become windows
    with holes, of which one element in each is real.
    """
    left, right = (inside[name].arrays[0] for name in one.operands[:2])
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.attributes)
    assert labels, one.attributes
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def per_dimension(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * rank

    rank = sum(label.isdigit() for label in labels[3])
    strides, dilations, holes = (
        [int(n) for n in per_dimension(key, "1")] for key in ("stride", "rhs_dilate", "lhs_dilate")
    )
    pads = [tuple(int(n) for n in pad.split("_")) for pad in per_dimension("pad", "0_0")]
    pairs = 1
    for d in range(rank):
        size_in = left.shape[labels[1].index(str(d))]
        size_window = right.shape[labels[2].index(str(d))]
        size_out = one.arrays[0].shape[labels[3].index(str(d))]
        pairs *= _valid(
            size_in, size_window, size_out, strides[d], pads[d][0], dilations[d], holes[d]
        )
    batch = one.arrays[0].shape[labels[3].index("b")]
    features = one.arrays[0].shape[labels[3].index("f")]
    return 2.0 * batch * features * right.shape[labels[2].index("i")] * pairs


def _valid(
    size_in: int, size_window: int, size_out: int, stride: int, pad: int, dilation: int, hole: int
) -> int:
    """Pairs of an output place and a window place that meet a real input."""
    total = 0
    window = np.arange(size_window) * dilation
    for out in _chunks(size_out):
        at = out[:, None] * stride + window[None, :] - pad
        total += int(((at >= 0) & (at % hole == 0) & (at // hole < size_in)).sum())
    return total


def _chunks(size: int) -> Iterator[np.ndarray]:
    for start in range(0, size, 4096):
        yield np.arange(start, min(start + 4096, size))
