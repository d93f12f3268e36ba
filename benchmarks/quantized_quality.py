"""Bits per byte of trained models in every type that they are served in.

    python -m benchmarks.quantized_quality RUN [RUN ...] --data TEXT

Each RUN, the folder of a run, is measured on TEXT, a file that it was not trained on, by `grok
eval` in float32, bfloat16, int8, int4 and int4_all (attention too), computing in float32, in int8
and int4 with int8 activations (W8A8, W4A8), and in both with int8 token tables. Prints, for each
type, the bits per byte of each run, the mean, and its increase over float32; then the relative
r.m.s. error that quantising made in the matrices; and a line of JSON.
"""

import argparse
import json
import subprocess
import sys

import numpy as np

from grok.weights.array_difference import ArrayDifference
from grok.weights.cast import MeasuredQuantizedSource, converted
from grok.weights.detect import open_source
from grok.weights.source import blocks, layer_pieces

# Types of the parameters, the products and the token tables.
FORMS = {
    "float32": ("float32", "compute", "float"),
    "bfloat16": ("bfloat16", "compute", "float"),
    "int8": ("int8", "compute", "float"),
    "int8, tables too": ("int8", "compute", "int8"),
    "W8A8": ("int8", "int8", "float"),
    "int4": ("int4", "compute", "float"),
    "int4, tables in int8": ("int4", "compute", "int8"),
    "W4A8": ("int4", "int8", "float"),
    "int4_all": ("int4_all", "compute", "float"),
}


def main() -> None:
    """Measures the runs and prints what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    bits = {
        name: [measure(run, *form, options.data) for run in options.runs]
        for name, form in FORMS.items()
    }
    print("| type | bits per byte of each run | mean | increase |\n|---|---|---|---|")
    for name, values in bits.items():
        mean = float(np.mean(values))
        increase = mean / float(np.mean(bits["float32"])) - 1
        each = ", ".join(f"{value:.4f}" for value in values)
        print(f"| {name} | {each} | {mean:.4f} | {increase:+.2%} |")
    errors = {dtype: rounding_errors(options.runs[0], dtype) for dtype in ("int8", "int4_all")}
    print("\n| matrix | int8 | int4 |\n|---|---|---|")
    for name, error in errors["int8"].items():
        print(f"| {name} | {error:.2%} | {errors['int4_all'][name]:.2%} |")
    print(json.dumps({"bits_per_byte": bits, "relative_rms": errors}))


def measure(run: str, param: str, matmul: str, embedding: str, data: str) -> float:
    """Bits per byte of a run's newest checkpoint in these types."""
    types = {"param": param, "compute": "float32", "matmul": matmul, "embedding": embedding}
    keys = [f"model.{name}_dtype={dtype}" for name, dtype in types.items()]
    command = [sys.executable, "-m", "grok", "eval", run, *keys, "--data", data, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["data"][0]["bits_per_byte"]


def rounding_errors(run: str, dtype: str) -> dict[str, float]:
    """Relative r.m.s. error of each matrix in a type."""
    source = converted(open_source(run), dtype, measure=True)
    assert isinstance(source, MeasuredQuantizedSource)
    errors = {}
    for name, spec in source.tensors.items():
        if spec.groups is not None:
            for _, piece in layer_pieces(spec):
                for part in blocks(spec, piece):
                    source.read(name, part)
            pieces = (error for (of, _), error in source.errors.items() if of == name)
            errors[name] = sum(pieces, ArrayDifference()).relative_rms
    return errors


if __name__ == "__main__":
    main()
