"""Walks through schedules that were written for this, against times by hand: compute takes a second
for each product, a collective two for each gather, and one that runs beside ends when both have."""

from pathlib import Path

import pytest

from grok.plan.program_cost import CompiledProgram
from grok.plan.schedule import Schedule

MESH = {"slice": 1, "data": 2, "expert": 1, "tensor": 1}
PRODUCT = 2 * 128 * 128 * 128  # FLOPs
GATHERED = 128 * 128 * 2  # bytes that a device sends


def seconds_of(cost):
    sent = sum(cost.collectives.values())
    wires, host = 2 * sent / GATHERED, cost.host / GATHERED
    return {"compute": cost.flops / PRODUCT, "hbm": 0.0, "interconnect": wires, "host": host}


def walk(*body, extra=""):
    lines = "\n".join(f"  {line}" for line in body)
    text = f"""HloModule step, is_scheduled=true
{extra}
ENTRY %main (x: bf16[128,128], y: bf16[128,128]) -> bf16[256,128] {{
  %x = bf16[128,128]{{1,0}} parameter(0)
  %y = bf16[128,128]{{1,0}} parameter(1)
{lines}
}}
"""
    return Schedule(CompiledProgram(text, MESH), seconds_of).walk()


def product(name):
    return (
        f"%{name} = bf16[128,128]{{1,0}} dot(%x, %y), lhs_contracting_dims={{1}}, "
        "rhs_contracting_dims={0}"
    )


def gather(name):
    return f"%{name} = bf16[256,128]{{1,0}} all-gather(%x), replica_groups={{{{0,1}}}}"


def start(name):
    return (
        f"%{name} = (bf16[128,128]{{1,0}}, bf16[256,128]{{1,0}}) all-gather-start(%x), "
        "replica_groups={{0,1}}"
    )


def done(name):
    return f"%{name}.done = bf16[256,128]{{1,0}} all-gather-done(%{name})"


def test_a_collective_without_a_pair_blocks():
    step = walk(product("a"), gather("g"), product("b"))
    assert step.seconds == 4
    assert list(step.exposed.values()) == [2]
    assert (step.sent, step.sent_beside) == (GATHERED, 0)


@pytest.mark.parametrize(("products", "seconds"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_a_pair_runs_beside_what_stands_between(products, seconds):
    step = walk(start("g"), *(product(f"p{i}") for i in range(products)), done("g"))
    assert step.seconds == seconds
    assert sum(step.exposed.values()) == max(0, 2 - products)
    assert (step.sent, step.sent_beside) == (GATHERED, GATHERED)


def test_a_copy_to_host_memory_is_waited_for_by_its_name():
    step = walk(
        "%out = (bf16[128,128]{1,0:S(5)}, bf16[128,128]{1,0}, u32[]) copy-start(%x), "
        'metadata={op_name="jit(step)/offload"}',
        "%out.done = bf16[128,128]{1,0:S(5)} copy-done(%out)",
        product("a"),
    )
    assert step.exposed == {"host memory: jit(step)/offload": 1}
    assert step.seconds == 2


def test_pairs_share_the_wires():
    step = walk(start("g"), start("h"), product("a"), done("g"), product("b"), done("h"))
    # One second of `g` beside `a`, one alone; one of `h` beside `b`, one alone.
    assert step.seconds == 4


def test_a_collective_that_blocks_holds_up_one_beside_it():
    assert walk(start("g"), gather("h"), done("g")).seconds == 4


def test_what_is_never_waited_for_ends_with_the_program():
    assert walk(start("g"), product("a")).seconds == 2


FUSED = """
%start (p: bf16[128,128]) -> (bf16[128,128], bf16[256,128]) {
  %p = bf16[128,128]{1,0} parameter(0)
  %begun = u32[] custom-call(), custom_call_target="begin"
  %all = bf16[256,128]{1,0} all-gather(%p), replica_groups={{0,1}}
  ROOT %both = (bf16[128,128]{1,0}, bf16[256,128]{1,0}) tuple(%p, %all)
}

%meanwhile (q: bf16[256,128], u: bf16[128,128], v: bf16[128,128]) -> (bf16[256,128], bf16[128,128]) {
  %q = bf16[256,128]{1,0} parameter(0)
  %u = bf16[128,128]{1,0} parameter(1)
  %v = bf16[128,128]{1,0} parameter(2)
  %going = u32[] custom-call(), custom_call_target="continue"
  %more = bf16[256,128]{1,0} all-gather(%u), replica_groups={{0,1}}
  %dot = bf16[128,128]{1,0} dot(%u, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %pair = (bf16[256,128]{1,0}, bf16[128,128]{1,0}) tuple(%q, %dot)
}

%end (r: bf16[256,128]) -> bf16[256,128] {
  %r = bf16[256,128]{1,0} parameter(0)
  %ended = u32[] custom-call(), custom_call_target="end"
  ROOT %last = bf16[256,128]{1,0} all-gather(%r), replica_groups={{0,1}}
}
"""  # noqa: E501


def test_a_collective_fused_with_work_runs_beside_it():
    step = walk(
        "%async-collective-start = (bf16[128,128], bf16[256,128]) fusion(%x), calls=%start",
        "%sent = bf16[256,128]{1,0} get-tuple-element(%async-collective-start), index=1",
        "%work = (bf16[256,128]{1,0}, bf16[128,128]{1,0}) fusion(%sent, %x, %y), calls=%meanwhile",
        "%passed = bf16[256,128]{1,0} get-tuple-element(%work), index=0",
        "%async-collective-done = bf16[256,128]{1,0} fusion(%passed), calls=%end",
        extra=FUSED,
    )
    assert step.seconds == 2  # one of them beside the product
    assert (step.sent, step.sent_beside) == (GATHERED, GATHERED)


CALLED = """
%gathering (p: bf16[128,128]) -> bf16[256,128] {
  %p = bf16[128,128]{1,0} parameter(0)
  ROOT %all = bf16[256,128]{1,0} all-gather(%p), replica_groups={{0,1}}
}, execution_thread="sparsecore"
"""


def test_a_collective_that_another_core_runs():
    step = walk(
        "%call = ((bf16[128,128]), bf16[256,128], u32[]) async-start(%x), calls=%gathering",
        product("a"),
        product("b"),
        "%all = bf16[256,128]{1,0} async-done(%call), calls=%gathering",
        extra=CALLED,
    )
    assert step.seconds == 2
    assert step.sent_beside == GATHERED


def test_a_start_without_operands_begins_when_it_gets_them():
    step = walk(
        "%call = ((), (), (s32[1])) call-start(), to_apply=%gathering",
        product("a"),
        "%given = ((bf16[128,128]), bf16[256,128]) call-update(%call, %x)",
        product("b"),
        "%all = bf16[256,128]{1,0} call-done(%given)",
        extra=CALLED,
    )
    assert step.seconds == 3


def test_a_loop_takes_its_body_as_often_as_it_runs():
    text = (Path(__file__).parent / "program.txt").read_text()
    mesh = {"slice": 1, "data": 2, "expert": 2, "tensor": 2}
    program = CompiledProgram(text, mesh, 3)

    def seconds(cost):
        sent = sum(cost.collectives.values())
        return {"compute": cost.flops, "hbm": cost.hbm, "interconnect": sent}

    step, total = Schedule(program, seconds).walk(), seconds(program.cost())
    assert step.use == pytest.approx(total)
    assert max(total.values()) <= step.seconds <= sum(total.values())
    products, bytes_of_loop = 4 * 2 * 128 * 256 * 512, 4 * 3 * 256 * 512
    assert step.seconds >= products + bytes_of_loop
