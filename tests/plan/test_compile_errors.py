"""Messages of the compiler, as it wrote them, in sentences for people."""

import pytest

from grok.config.load import load_config
from grok.plan.compile_errors import compiler_error, crash_error, is_out_of_hbm

MESH = {"slice": 1, "data": 8, "expert": 2, "tensor": 1}
VMEM = (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem "
    "while allocating on stack for %grouped_hidden.2. Scoped allocation with size 57.33M and limit "
    "56.25M exceeded scoped vmem limit by 1.08M.\n\nMore follows."
)
HBM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
    "memory in memory space hbm. Used 31.64G of 31.24G hbm."
)
FAILED = (
    "INTERNAL: RET_CHECK failure (while_loop_all_reduce_code_motion.cc:1012) new_while != nullptr"
)


def test_vector_memory_is_not_hbm():
    assert is_out_of_hbm(HBM)
    assert not is_out_of_hbm(VMEM)
    text = str(compiler_error(VMEM, load_config("grok-10m"), MESH))
    assert "more vector memory than a core has" in text
    assert "size 57.33M and limit 56.25M" in text
    assert "mesh.expert=4 or mesh.tensor=2" in text
    assert "More follows" not in text
    assert "\n" not in text


@pytest.mark.parametrize("splits", [1, 2])
def test_a_failure_inside_the_compiler_says_what_to_try(splits):
    assert not is_out_of_hbm(FAILED)
    config = load_config("grok-10m", [f"train.grad_accum_steps={splits}", "data.batch_size=16"])
    error = compiler_error(FAILED, config, MESH)
    assert error.exit_code == 1
    assert "RET_CHECK failure (while_loop_all_reduce_code_motion.cc:1012)" in str(error)
    assert ("train.grad_accum_steps=1" in str(error)) == (splits > 1)


def test_a_crash_gives_the_last_words():
    text = str(crash_error("SIGABRT", "F0000 pass.cc:12] Check failed: a == b\n\n"))
    assert "crashed (SIGABRT)" in text
    assert "Check failed: a == b" in text
