"""A plan as text: the verdict first, then the figures and assumptions that it rests on."""

import math
from collections.abc import Iterator

from grok.hardware import GIB
from grok.model.params import num_parameters
from grok.plan.estimate import Plan, recomputed_flops
from grok.plan.presets import filling_batch, made_for
from grok.plan.published import describe, published_runs
from grok.plan.saves import Saves, describe_saves
from grok.plan.suggestions import suggestions

# The times of a step, and what each supposes.
STEPS = {
    "scheduled": "by the compiled schedule",
    "overlapped": "if all terms overlap",
    "serial": "if none overlaps",
}
MIN_WAIT = 0.005  # shortest wait that is listed, as a share of the step


def format_plan(plan: Plan, saves: Saves | None = None) -> str:
    """The whole plan, and the checkpoints of its run, as lines of text."""
    return "\n".join(f"{label:<14}{text}".rstrip() for label, text in _rows(plan, saves))


def _rows(plan: Plan, saves: Saves | None) -> Iterator[tuple[str, str]]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_sizes.items())
    yield "program", _describe_program(plan)
    yield "slice", f"{plan.slice}, {plan.slice.num_chips:,} chips; mesh {axes}"
    yield from _memory(plan)
    if plan.fits:
        yield from _work(plan)
        yield from _time(plan)
        if saves is not None:
            price = plan.price and plan.price.usd_per_hour * plan.slice.num_chips
            yield from _labelled("checkpoints", describe_saves(saves, price))
        yield from _labelled("published", map(describe, published_runs(plan)))
        if batch := filling_batch(plan):
            yield "would fill", batch
    if preset := made_for(plan):
        yield "preset", preset
    yield "", ""
    yield from _labelled("assuming", _assumptions(plan))


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    sizes = f"state {_gib(plan.state)}"
    if plan.total is not None:
        sizes += f" + temporaries {_gib(plan.total - plan.state)} = {_gib(plan.total)}"
    verdict = "fits" if plan.fits else "does not fit"
    yield "memory", f"{verdict}: {sizes} of {_gib(plan.slice.chip.hbm)} GiB a chip"
    per_chip = plan.measured["devices_per_chip"]
    for name, size in plan.measured["largest_state"]:
        yield "", f"{_gib(size * per_chip)} GiB  {name.removesuffix('.value')}"
    for shape, op_name, size in plan.measured.get("largest_temporaries", ()):
        yield "", f"{_gib(size * per_chip)} GiB  {shape} made by {_short(op_name)}"
    if plan.measured.get("compiler_message"):
        yield "compiler", " ".join(plan.measured["compiler_message"].split())
    if not plan.fits:
        yield from _labelled("would fit", suggestions(plan))


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    assert plan.flops is not None and plan.hbm is not None and plan.collectives is not None
    text = f"{amount(plan.model_flops)} of the model, {amount(plan.flops)} compiled "
    text += f"({plan.flops / plan.model_flops:.2f} x"
    if again := recomputed_flops(plan):
        ratio = plan.flops / (plan.model_flops + again)
        text += f"; {ratio:.2f} x with those that remat={plan.config.model.remat} recomputes"
    text += "), a chip and step"
    if plan.flops_8bit:
        text += f"; {amount(plan.flops_8bit)} of them of 8-bit values"
    yield "FLOPs", text
    text = f"{amount(plan.hbm)}B read and written"
    if plan.config.plan.program != "train":
        text += f", {plan.hbm / plan.state:.2f} x weights and cache read once"
    yield "HBM", text
    if plan.host:
        rate, held = amount(plan.host / plan.step_seconds()["scheduled"]), _gib(plan.host_memory)
        text = f"{amount(plan.host)}B to host memory and back, which holds {held} GiB a chip; "
        yield "hosts", f"{text}in a scheduled step, {rate}B/s"
    sent = sum(sum(kinds.values()) for kinds in plan.collectives.values())
    text = f"{amount(sent)}B sent"
    if (share := plan.async_collective_share()) is not None:
        text += f", {share:.1%} of it beside other work"
    yield "interconnect", text
    for axes, kinds in sorted(plan.collectives.items()):
        bytes_sent = ", ".join(f"{kind} {amount(sent)}B" for kind, sent in sorted(kinds.items()))
        wiring, seconds = plan.measured["wiring"][axes], _seconds(plan.interconnect[axes])
        medium = "the network" if wiring["slices"] else f"links: {wiring['links']:g}"
        yield "", f"over {axes}: {bytes_sent}; {seconds} on {medium}"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    terms = ", ".join(f"{name} {_seconds(time)}" for name, time in plan.seconds.items())
    yield "roofline", f"{terms}; {max(plan.seconds, key=plan.seconds.__getitem__)} bounds it"
    steps, rates, mfu = plan.step_seconds(), plan.tokens_per_second(), plan.mfu()
    prices = plan.usd_per_billion_tokens()
    for name in steps:
        how = STEPS.get(name, f"as {plan.ratio_source}")
        text = f"{_seconds(steps[name])} a step {how}: {rates[name]:,.4g} tokens/s/chip, "
        text += f"MFU {mfu[name]:.1%}"
        if prices:
            text += f", {prices[name]:,.0f} USD per billion tokens"
        yield name, text
    exposed, waits = (plan.measured["schedule"][key] for key in ("exposed", "longest_waits"))
    yield "waits", f"{_seconds(exposed)} of the schedule for communication alone"
    for label, seconds in waits:
        if seconds > MIN_WAIT * steps["scheduled"]:
            yield "", f"{_seconds(seconds)} for {_short_wait(label)}"
    yield "compiled", f"in {plan.compile_seconds:,.0f} s"


def _assumptions(plan: Plan) -> Iterator[str]:
    rates, measured = plan.rates, plan.measured
    text = f"a {plan.slice.generation} chip does {rates.flops / 1e12:,.4g} TFLOP/s in {rates.dtype}"
    if plan.flops_8bit and rates.flops_8bit:
        text += f" and {rates.flops_8bit / 1e12:,.4g} TOP/s in {plan.config.model.matmul_dtype}"
    text += f", has {plan.slice.chip.hbm / GIB:.0f} GiB at {rates.hbm / 1e9:,.0f} GB/s"
    if math.isfinite(rates.link):
        text += f", and links of {rates.link / 1e9:.4g} GB/s each way"
    yield text
    if plan.slice.count > 1:
        yield f"a chip's share of the network between slices is {rates.network / 1e9:g} GB/s"
    if plan.flops_8bit:
        yield "MFU is a share of the peak in bfloat16; products in 8 bits may exceed it"
    yield rates.source
    if plan.fits and "counted" in measured:
        yield (
            "FLOPs are the model's and HBM bytes the state's, read once: the text of a program for "
            "these devices hides its products; the schedule is both terms, one after the other"
        )
    elif plan.fits:
        yield (
            "compiled FLOPs are those of matrix products and kernels; HBM bytes are operands and "
            "results that the compiler placed there"
        )
        yield (
            "collectives use ring algorithms at the full speed of the links along their mesh axes "
            "(two per side that closes to a ring, else one), one axis after the other"
        )
        yield (
            "the schedule runs instructions one after the other, each as long as its FLOPs, HBM "
            "bytes or transfers take; transfers that the compiler started early run beside them"
        )
        yield "state stays in place between steps, and no step waits for input"
        if plan.host:
            yield (
                f"{rates.host / 1e9:g} GB/s to host memory and back; the peak is what the compiler "
                "allocates in HBM"
            )
    if plan.fits:
        if plan.config.plan.program == "decode":
            yield (
                "the engine's thread works beside the devices, as long as benchmarks/results/"
                "cpu.md measured"
            )
        loops, kernels = len(measured["loops"]), len(measured["kernels"])
        if loops and plan.config.plan.program == "train":
            yield f"{loops} loops over tiles of an expert's rows run as often as an even load asks"
        elif loops:
            yield f"{loops} loops over the cache run for {plan.config.plan.tokens} tokens"
        if kernels:
            authors = f"{kernels} kernels cost what their authors state"
            yield f"{authors}, those of attention what their shapes imply"
    cost = plan.price and f"a chip-hour costs {plan.price.usd_per_hour:g} USD ({plan.price.source})"
    yield cost or "no price of the chip is known; --price gives one"


def _describe_program(plan: Plan) -> str:
    model, optimizer, (rows, length) = plan.config.model, plan.config.optimizer, plan.batch
    size = f"{num_parameters(model):,} parameters in {model.param_dtype}"
    if plan.config.plan.program == "prefill":
        return f"prefill of {rows} x {length} tokens, {size}"
    if plan.config.plan.program == "decode":
        return f"decode of {rows} rows, {length} tokens each in the cache, {size}"
    splits = plan.config.train.grad_accum_steps
    text = f"train on {rows:,} x {length:,} tokens in {splits} microbatch{'es' * (splits > 1)}, "
    text += f"{size}, {optimizer.name} with moments in {optimizer.moments_dtype}"
    return f"{text}{' in host memory' * optimizer.offload}, remat {model.remat}"


def _labelled(label: str, texts) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(texts):
        yield "" if number else label, text


def amount(number: float, digits: int = 4) -> str:
    """A number with an SI prefix; a unit may follow."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.{digits}g} {prefix}"
        number /= 1000
    return f"{number:,.{digits}g} P"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _seconds(time: float) -> str:
    return f"{time:,.3g} s" if time >= 1 else f"{time * 1e3:,.3g} ms"


def _short(op_name: str) -> str:
    names = [name for name in op_name.split("/") if name not in ("while", "body", "eval_jaxpr")]
    return "/".join(names[-3:])


def _short_wait(label: str) -> str:
    kinds, op_name = label.split(": ", 1)
    return f"{kinds}: {_short(op_name)}"
