"""Kernels of attention cost what their shapes say, and a collective beside work counts once."""

from grok.plan.program_cost import CompiledProgram
from grok.plan.rates import Rates

MESH = {"slice": 1, "data": 2, "expert": 1, "tensor": 1}

# Four heads of 128, 256 tokens in two blocks a side: of four pairs of blocks three are computed.
SPLASH = """
ENTRY %main (q: bf16[4,256,128], k: bf16[2,256,128]) -> bf16[4,256,128] {
  %mask = s8[1,2,2]{2,1,0:S(1)} constant(0)
  %q = bf16[4,256,128]{2,1,0} parameter(0)
  %k = bf16[2,256,128]{2,1,0} parameter(1)
  ROOT %splash_mha_dq_segmented.1 = bf16[4,256,128]{2,1,0} custom-call(%mask, %mask, %q, %k, %k)
}
"""


def test_splash_passes_over_what_the_diagonal_hides():
    cost = CompiledProgram(SPLASH, MESH).cost()
    pairs = 4 * 3
    assert cost.flops == 3 * pairs * (2 * 128 * 128 * 128)
    q = 4 * 256 * 128 * 2
    keys_and_values = pairs * 2 * 128 * 128 * 2
    assert cost.hbm == q + keys_and_values + q


def test_splash_of_several_rows_costs_them_all():
    rows = SPLASH.replace("4,256,128]", "3,4,256,128]").replace("{2,1,0} p", "{3,2,1,0} p")
    rows = rows.replace("bf16[2,256,128]", "bf16[3,2,256,128]").replace("{2,1,0} c", "{3,2,1,0} c")
    cost, one = CompiledProgram(rows, MESH).cost(), CompiledProgram(SPLASH, MESH).cost()
    assert (cost.flops, cost.hbm) == (3 * one.flops, 3 * one.hbm)


def test_splash_passes_over_what_lies_behind_a_window():
    """Eight blocks a side, of which a block of keys meets three blocks of queries."""
    window = SPLASH.replace("s8[1,2,2]", "s8[1,3,8]")
    cost = CompiledProgram(window, MESH).cost()
    pairs = 4 * (1 + 2 + 6 * 3)
    assert cost.flops == 3 * pairs * (2 * 32 * 32 * 128)


# Two sequences of three pages of eight tokens, two kv heads; one query each, or eight.
RAGGED = """
ENTRY %main (q: bf16[{queries},4,128], kv: bf16[12,8,4,128]) -> bf16[{queries},4,128] {{
  %lengths = s32[2]{{0}} constant(0)
  %table = s32[2,3]{{1,0}} constant(0)
  %starts = s32[3]{{0}} constant(0)
  %place = s32[2]{{0}} constant(0)
  %number = s32[1]{{0}} constant(2)
  %q = bf16[{queries},4,128]{{2,1,0}} parameter(0)
  %kv = bf16[12,8,4,128]{{3,2,1,0}} parameter(1)
  ROOT %ragged_paged_attention_kernel.1 = bf16[{queries},4,128]{{2,1,0}} custom-call(%lengths, %table, %starts, %place, %number, %q, %kv)
}}
"""  # noqa: E501


def test_pages_are_read_once_by_a_token_and_half_by_a_prompt():
    token = 4 * 128 * 2  # bytes of keys and values
    for queries, keys in ((1, 48), (8, 24)):
        cost = CompiledProgram(RAGGED.format(queries=2 * queries), MESH).cost()
        assert cost.flops == 2 * 2 * keys * queries * 4 * 128
        assert cost.hbm == 2 * (2 * queries * 4 * 128 * 2) + keys * token


# An all-gather that starts, goes on beside a product, and ends: three fusions, each with it inside.
BESIDE = """
%begin (part: bf16[64,128]) -> (bf16[64,128], bf16[128,128], u32[]) {
  %part = bf16[64,128]{1,0} parameter(0)
  %whole = bf16[128,128]{1,0} all-gather(%part), replica_groups={{0,1}}, dimensions={0}
  ROOT %started = (bf16[64,128]{1,0}, bf16[128,128]{1,0}, u32[]{:S(2)}) custom-call(%whole)
}

%meanwhile (part.1: bf16[64,128], target: bf16[128,128], x: bf16[32,128]) -> (bf16[32,128], bf16[128,128]) {
  %part.1 = bf16[64,128]{1,0} parameter(0)
  %target = bf16[128,128]{1,0} parameter(1)
  %x = bf16[32,128]{1,0} parameter(2)
  %whole.1 = bf16[128,128]{1,0} all-gather(%part.1), replica_groups={{0,1}}, dimensions={0}
  %goes = bf16[128,128]{1,0} custom-call(%whole.1, %target)
  %y = bf16[32,128]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf
  ROOT %both = (bf16[32,128]{1,0}, bf16[128,128]{1,0}) tuple(%y, %goes)
}

ENTRY %main (part.2: bf16[64,128], x.1: bf16[32,128]) -> bf16[32,128] {
  %part.2 = bf16[64,128]{1,0} parameter(0)
  %x.1 = bf16[32,128]{1,0} parameter(1)
  %async-collective-start = (bf16[64,128]{1,0}, bf16[128,128]{1,0}, u32[]{:S(2)}) fusion(%part.2), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %source = bf16[64,128]{1,0} get-tuple-element(%async-collective-start), index=0
  %made = bf16[128,128]{1,0} get-tuple-element(%async-collective-start), index=1
  %fusion = (bf16[32,128]{1,0}, bf16[128,128]{1,0}) fusion(%source, %made, %x.1), kind=kCustom, output_to_operand_aliasing={{1}: (1, {})}, calls=%meanwhile
  ROOT %out = bf16[32,128]{1,0} get-tuple-element(%fusion), index=0
}
"""  # noqa: E501


def test_a_collective_beside_work_counts_once():
    cost = CompiledProgram(BESIDE, MESH).cost()
    part, whole, x = 64 * 128 * 2, 128 * 128 * 2, 32 * 128 * 2
    assert cost.collectives == {("data", "all-gather"): part}
    assert cost.hbm == whole + (part + x) + x


# Products of 8-bit values, and with weights in 8 bits alone; a kernel with a sum to start from.
EIGHT_BITS = """
ENTRY %main (x: s8[32,64], w: s8[64,128], y: bf16[32,64]) -> bf16[32,128] {
  %x = s8[32,64]{1,0} parameter(0)
  %w = s8[64,128]{1,0} parameter(1)
  %y = bf16[32,64]{1,0} parameter(2)
  %scales = f32[32,1]{1,0} constant(0)
  %both = s32[32,128]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %start = bf16[32,128]{1,0} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = bf16[32,128]{1,0} custom-call(%y, %w), backend_config={"cost_estimate":{"flops":"10"}}
  ROOT %scaled_matmul.1 = bf16[32,128]{1,0} custom-call(%x, %scales, %w, %start), backend_config={"cost_estimate":{"flops":"1000"}}
}
"""  # noqa: E501


def test_products_of_8_bit_values_are_counted_for_their_own_rate():
    cost = CompiledProgram(EIGHT_BITS, MESH).cost()
    product = 2 * 32 * 64 * 128
    assert cost.flops == 2 * product + 1010
    assert cost.flops_8bit == product + 1000
    rates = Rates(1.0, 1.0, 1.0, 1.0, 1.0, "", flops_8bit=4.0)
    assert rates.compute_seconds(cost.flops, cost.flops_8bit) == product + 10 + cost.flops_8bit / 4
