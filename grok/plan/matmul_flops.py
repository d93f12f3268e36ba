"""FLOPs of matrix products in a compiled program, per run of the instruction."""

import math
import re

import numpy as np

from grok.plan.hlo import Computation, Instruction
from grok.plan.kernels import kernel_flops


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product (two for each multiplication) or of a kernel; 0 for others."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0]
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [int(n) for n in match[1].split(",") if n] if match else []
        return (
            2
            * math.prod(instruction.arrays[0].shape)
            * math.prod(left.shape[d] for d in contracted)
        )
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        return kernel_flops(computation, instruction)
    return 0.0


def _convolution_flops(computation: Computation, conv: Instruction) -> float:
    """FLOPs of a convolution, not counting padding and holes.

    TPU programs express all matrix products as convolutions; batch dimensions become dilated
    windows, in each of which one element is real.
    """
    left, right = (computation[name].arrays[0] for name in conv.operands[:2])
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", conv.attributes)
    assert labels, conv.attributes
    window = re.search(r"window=\{([^}]*)\}", conv.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

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
        size_out = conv.arrays[0].shape[labels[3].index(str(d))]
        pairs *= _valid(
            size_in, size_window, size_out, strides[d], pads[d][0], dilations[d], holes[d]
        )
    batch = conv.arrays[0].shape[labels[3].index("b")]
    features = conv.arrays[0].shape[labels[3].index("f")]
    return 2.0 * batch * features * right.shape[labels[2].index("i")] * pairs


def _valid(
    size_in: int, size_window: int, size_out: int, stride: int, pad: int, dilation: int, hole: int
) -> int:
    """Pairs of an output and a window position that meet a real input."""
    total = 0
    window = np.arange(size_window) * dilation
    for start in range(0, size_out, 4096):  # in chunks, since there may be millions
        out = np.arange(start, min(start + 4096, size_out))
        at = out[:, None] * stride + window[None, :] - pad
        total += int(((at >= 0) & (at % hole == 0) & (at // hole < size_in)).sum())
    return total
