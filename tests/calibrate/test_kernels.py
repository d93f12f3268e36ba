"""The kernels' checks: every kernel is right, and a broken one is named."""

import json

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import grok.calibrate.kernels
import grok.ops.moe.grouped_matmul
from grok.calibrate.check import SMALL, Check
from grok.calibrate.kernels import BOUNDS, CHECKS, run_check
from grok.cli.main import main
from grok.errors import DIVERGED


def calibrate(out):
    arguments = ["calibrate", "--only", "kernels", "--out", str(out)]
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def two_checks(monkeypatch):
    """A kernel that is interpreted, and one that no interpreter runs."""
    chosen = [c for c in CHECKS if c.name in ("grouped_matmul", "ragged_attention, decode")]
    monkeypatch.setattr(grok.calibrate.kernels, "CHECKS", chosen)


def test_a_right_kernel_and_one_that_cannot_run_here(two_checks, tmp_path):
    result = calibrate(tmp_path / "right.json")
    assert result.exit_code == 0, result.output
    assert "1 of 1 kernels are right\nragged_attention, decode: not checked: " in result.stdout
    kernels = json.loads((tmp_path / "right.json").read_text())["kernels"]
    assert [kernel["name"] for kernel in kernels] == ["grouped_matmul", "ragged_attention, decode"]
    assert kernels[0]["errors"]["y"] < 1e-5


def test_a_kernel_that_is_broken_on_purpose_is_named(two_checks, tmp_path, monkeypatch):
    """Its products leave out the last of the contracted columns."""
    dot = grok.ops.moe.grouped_matmul.dot

    def broken(x, w, dim):
        return dot(x.at[:, -1].set(0), w, dim)

    monkeypatch.setattr(grok.ops.moe.grouped_matmul, "dot", broken)
    result = calibrate(tmp_path / "wrong.json")
    assert result.exit_code == DIVERGED
    assert "0 of 1 kernels are right\nWRONG: grouped_matmul, interpreted: y is off by 0." in (
        result.stdout
    )
    kernels = json.loads((tmp_path / "wrong.json").read_text())["kernels"]
    assert [kernel["is_wrong"] for kernel in kernels] == [True, False]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(two_checks, tmp_path):
    (tmp_path / "file").write_text("")
    result = calibrate(tmp_path / "file" / "out.json")
    assert "out.json cannot be written: " in (result.output or str(result.exception))
    assert "kernels are right" not in result.output


def fails(x, interpret):
    raise ValueError("block shapes\ndo not fit")


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda x, interpret: {"y": x.at[0].set(jnp.nan)}, "y is off by nan"),
        (lambda x, interpret: {"y": x * (1 + 1e-3)}, "y is off by 0.001 of its largest value"),
        (fails, "ValueError: block shapes"),
    ],
)
def test_a_result_that_is_no_number_or_missing_is_wrong(kernel, words):
    check = Check("a kernel", lambda sizes: (jnp.ones(4),), kernel, lambda x: {"y": x})
    result = run_check(check, "cpu")
    assert result.is_wrong and words in result.describe()


@pytest.mark.prove
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_kernel_is_right(check):
    result = run_check(check, "cpu")
    assert result.skipped == (not check.can_interpret)
    assert not result.is_wrong, result.describe()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_kernel_and_its_reference_have_the_same_results(check):
    """Traced alone, on inputs of the type that the bound is for."""
    inputs = jax.eval_shape(lambda: check.make_inputs(SMALL))
    assert any(array.dtype == SMALL.dtype for array in jax.tree.leaves(inputs))
    actual = jax.eval_shape(lambda *inputs: check.kernel(*inputs, interpret=True), *inputs)
    expected = jax.eval_shape(check.reference, *inputs)
    assert {name: x.shape for name, x in actual.items()} == {
        name: x.shape for name, x in expected.items()
    }
    assert SMALL.dtype in BOUNDS
