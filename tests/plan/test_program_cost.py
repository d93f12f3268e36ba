"""Costs of a compiled program, against counts by hand of one that was written for this.

`program.txt` has a loop over four layers (a slice of weights, a product, a reduce-scatter), a loop
whose count is data around a kernel, and a gather, on a mesh of 2 x 2 x 2.
"""

from pathlib import Path

import pytest

from grok.plan.program_cost import CompiledProgram, replica_groups

TEXT = (Path(__file__).parent / "program.txt").read_text()
MESH = {"slice": 1, "data": 2, "expert": 2, "tensor": 2}


@pytest.fixture(scope="module")
def cost():
    return CompiledProgram(TEXT, MESH, 3).cost()


def test_bodies_count_as_often_as_they_run(cost):
    products = 4 * (2 * 128 * 256 * 512)
    kernels = 3 * 1000
    assert cost.flops == products + kernels
    assert list(cost.loops) == ["jit(step)/experts/while"]
    assert list(cost.kernels) == ["jit(step)/gmm"]


def test_bytes_of_hbm_are_what_is_read_there_and_written_there(cost):
    x, w, y = 128 * 256 * 2, 256 * 512 * 2, 128 * 512 * 2
    # A layer: of the weights one slice (float32) is read and written narrow; x is in VMEM.
    layer = (2 * w + w) + (w + y) + y
    scalars = 3 * 4  # the layer's number at the slice, and with a constant at the sum
    kernels = 3 * 500
    assert cost.hbm == x + 4 * (layer + scalars) + kernels + y


def test_collectives_by_axes_and_kind_are_bytes_that_a_device_sends(cost):
    y = 128 * 512 * 2
    assert cost.collectives == {
        ("tensor", "reduce-scatter"): 4 * y / 2,
        ("data", "all-gather"): y / 2,
    }


def test_largest_arrays_are_those_made_in_hbm():
    program = CompiledProgram(TEXT, MESH, 3)
    shape, maker, size = program.largest_arrays(1)[0]
    assert (shape, maker, size) == ("bf16[256,512]", "jit(step)/while/body/w", 256 * 512 * 2)


BRANCHES = """
%dear (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %dot = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cheap (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %sum = f32[8,8]{1,0} all-reduce(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

ENTRY %main (which: pred[], x: f32[8,8]) -> f32[8,8] {
  %which = pred[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  ROOT %y = f32[8,8]{1,0} conditional(%which, %x, %x), true_computation=%dear, false_computation=%cheap
}
"""  # noqa: E501


def test_axes_of_the_cheaper_branch_are_known_too():
    """A walk through the schedule takes the time of every branch, and so its wiring."""
    program = CompiledProgram(BRANCHES, MESH)
    assert not program.cost().collectives
    assert program.collective_axes() == ["data"]


PUT = """
%fused (array: f32[4096,8], rows: s32[16,1], new: f32[16,8]) -> f32[4096,8] {
  %array = f32[4096,8]{1,0} parameter(0)
  %rows = s32[16,1]{1,0} parameter(1)
  %new = f32[16,8]{1,0} parameter(2)
  ROOT %put = f32[4096,8]{1,0} scatter(%array, %rows, %new), to_apply=%add
}

ENTRY %main (array.1: f32[4096,8], rows.1: s32[16,1], new.1: f32[16,8]) -> f32[4096,8] {
  %array.1 = f32[4096,8]{1,0} parameter(0)
  %rows.1 = s32[16,1]{1,0} parameter(1)
  %new.1 = f32[16,8]{1,0} parameter(2)
  ROOT %put.1 = f32[4096,8]{1,0} fusion(%array.1, %rows.1, %new.1), kind=kCustom, calls=%fused
}
"""


def test_rows_that_are_added_in_place_are_all_that_is_moved():
    part, indices = 16 * 8 * 4, 16 * 4
    # Read: the rows as they were, their numbers, what is added. Written: the rows.
    assert CompiledProgram(PUT, MESH).cost().hbm == 3 * part + indices


HOST = """
ENTRY %main (new: bf16[1,8,128], layer: s32[]) -> bf16[1,8,128] {
  %new = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %layer = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  %kept = bf16[64,8,128]{2,1,0:T(8,128)(2,1)S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %put = ((bf16[64,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}), bf16[64,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %new, %layer)
  %all = bf16[64,8,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%put)
  %cut = ((bf16[64,8,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[]{:T(128)}), bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) dynamic-slice-start(%all, %layer), dynamic_slice_sizes={1,8,128}
  %part = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%cut)
  %away = (bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%part)
  ROOT %gone = bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(5)} copy-done(%away)
}
"""  # noqa: E501


def test_what_goes_to_the_hosts_memory_and_back():
    part, cost = 8 * 128 * 2, CompiledProgram(HOST, MESH).cost()
    assert cost.host == 3 * part  # one put there, one cut out, one copied there
    assert cost.hbm == 3 * part


NESTED = """
%other_layout (p: s8[64,128,256]) -> s8[64,128,256] {
  %p = s8[64,128,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %same = s8[64,128,256]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%product (x: bf16[8,128], w: bf16[128,256]) -> f32[8,256] {
  %x = bf16[8,128]{1,0} parameter(0)
  %w = bf16[128,256]{1,0} parameter(1)
  ROOT %y = f32[8,256]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%fused (w.1: s8[64,128,256], layer: s32[], x.1: bf16[8,128]) -> f32[8,256] {
  %w.1 = s8[64,128,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %layer = s32[]{:T(128)S(6)} parameter(1)
  %x.1 = bf16[8,128]{1,0} parameter(2)
  %laid_out = s8[64,128,256]{2,1,0:T(8,128)(4,1)} fusion(%w.1), kind=kLoop, calls=%other_layout
  %zero = s32[] constant(0)
  %part = s8[1,128,256]{2,1,0} dynamic-slice(%laid_out, %layer, %zero, %zero)
  %flat = s8[128,256]{1,0} bitcast(%part)
  %wide = bf16[128,256]{1,0} convert(%flat)
  ROOT %y.1 = f32[8,256]{1,0} fusion(%x.1, %wide), kind=kOutput, calls=%product
}

ENTRY %main (w.2: s8[64,128,256], layer.1: s32[], x.2: bf16[8,128]) -> f32[8,256] {
  %w.2 = s8[64,128,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %layer.1 = s32[]{:T(128)S(6)} parameter(1)
  %x.2 = bf16[8,128]{1,0} parameter(2)
  ROOT %y.2 = f32[8,256]{1,0} fusion(%w.2, %layer.1, %x.2), kind=kOutput, calls=%fused
}
"""


def test_fusions_inside_fusions_are_looked_through():
    cost = CompiledProgram(NESTED, MESH).cost()
    assert cost.flops == 2 * 8 * 128 * 256
    # One layer of the int8 weights as int8, the rows, the result.
    assert cost.hbm == 128 * 256 + 8 * 128 * 2 + 8 * 256 * 4


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_every_form(attributes, groups):
    assert replica_groups(attributes, 4).tolist() == groups
