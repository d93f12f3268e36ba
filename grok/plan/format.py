"""A plan as an engineer would put it: the verdict first, then what it rests on."""

from collections.abc import Iterator

from grok.hardware import GIB
from grok.plan.estimate import Plan, recomputed_flops
from grok.plan.suggestions import remedies

WIDTH = 14


def report(plan: Plan) -> str:
    """The whole answer, as lines of text."""
    rows = list(_rows(plan))
    return "\n".join(f"{label:<{WIDTH}}{text}".rstrip() for label, text in rows)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
    yield "program", describe_program(plan)
    yield "slice", f"{plan.slice}, {plan.slice.num_chips:,} chips; mesh {axes}"
    yield from _memory(plan)
    if plan.fits:
        yield from _work(plan)
        yield from _time(plan)
    yield "", ""
    yield from labelled("assuming", assumptions(plan))


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    capacity = plan.slice.chip.hbm
    sizes = f"state {_gib(plan.state)}"
    if plan.total is not None:
        sizes += f" + temporaries {_gib(plan.total - plan.state)} = {_gib(plan.total)}"
    verdict = "fits" if plan.fits else "does not fit"
    yield "memory", f"{verdict}: {sizes} of {_gib(capacity)} GiB a chip"
    per_chip = plan.found["devices_per_chip"]
    for name, size in plan.found["largest_state"]:
        yield "", f"{_gib(size * per_chip)} GiB  {name.removesuffix('.value')}"
    for shape, maker, size in plan.found.get("largest_temporaries", ()):
        yield "", f"{_gib(size * per_chip)} GiB  {shape} made by {_short(maker)}"
    if plan.found.get("account"):
        yield "compiler", " ".join(plan.found["account"].split())
    if not plan.fits:
        yield from labelled("would fit", remedies(plan))


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    assert plan.flops is not None and plan.hbm is not None and plan.collectives is not None
    text = f"{_amount(plan.model_flops)} of the model, {_amount(plan.flops)} compiled "
    text += f"({plan.flops / plan.model_flops:.2f} x"
    again = recomputed_flops(plan)
    if again:
        ratio = plan.flops / (plan.model_flops + again)
        text += f"; {ratio:.2f} x with what remat={plan.config.model.remat} computes again"
    yield "FLOPs", f"{text}), a chip and step"
    text = f"{_amount(plan.hbm)}B read and written"
    if plan.config.plan.program != "train":
        text += f", {plan.hbm / plan.state:.2f} x weights and cache read once"
    yield "HBM", text
    if plan.host:
        rate = _amount(plan.host / plan.step_seconds()["overlapped"])
        yield (
            "hosts",
            f"{_amount(plan.host)}B to their memory and back, where {_gib(plan.on_hosts)} GiB a "
            f"chip lie; beside the shortest step, {rate}B/s",
        )
    yield "interconnect", f"{_amount(sum(map(_sum, plan.collectives.values())))}B sent"
    for across, kinds in sorted(plan.collectives.items()):
        parts = ", ".join(f"{kind} {_amount(sent)}B" for kind, sent in sorted(kinds.items()))
        assert plan.interconnect is not None
        links = plan.found["wires"][across]["links"]
        over = "the network" if plan.found["wires"][across]["slices"] else f"links: {links}"
        yield "", f"over {across}: {parts}; {_seconds(plan.interconnect[across])} on {over}"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    assert plan.seconds is not None
    terms = ", ".join(f"{name} {_seconds(time)}" for name, time in plan.seconds.items())
    yield "roofline", f"{terms}; {max(plan.seconds, key=plan.seconds.__getitem__)} bounds it"
    steps, rates, mfu = plan.step_seconds(), plan.tokens_per_second(), plan.mfu()
    prices = plan.usd_per_billion_tokens()
    for name, how in (("overlapped", "all terms overlap"), ("serial", "none overlaps")):
        text = (
            f"{_seconds(steps[name])} a step where {how}: {rates[name]:,.4g} tokens/s/chip, "
            f"MFU {mfu[name]:.1%}"
        )
        if prices is not None:
            text += f", {prices[name]:,.0f} USD a billion tokens"
        yield name, text
    yield "compiled", f"in {plan.compile_seconds:,.0f} s"


def assumptions(plan: Plan) -> Iterator[str]:
    """What the figures rest on, a sentence each."""
    chip, found = plan.slice.chip, plan.found
    yield (
        f"a {plan.slice.generation} chip does {chip.flops / 1e12:,.0f} TFLOP/s in bfloat16, has "
        f"{chip.hbm / GIB:.0f} GiB at {chip.bandwidth / 1e9:,.0f} GB/s, and links of "
        f"{chip.link / 1e9:.0f} GB/s each way"
    )
    if plan.slice.count > 1:
        yield f"a chip's share of the network between slices is {chip.network / 1e9:g} GB/s"
    if plan.fits:
        yield (
            "compiled FLOPs are those of matrix products and of kernels; HBM bytes are operands "
            "and results that the compiler placed there"
        )
        yield (
            "collectives send what ring algorithms send, at full speed of the links along their "
            "mesh axes (two a side that closes to a ring, else one), one axis after the other"
        )
        yield "state stays where it is between steps, and the input never makes a step wait"
        if plan.host:
            yield (
                "what goes to the hosts' memory and back takes no time of the step's, and the peak "
                "is what the compiler allocates in HBM"
            )
        if found["loops"]:
            yield (
                f"{len(found['loops'])} loops over the cache run as far as "
                f"{plan.config.plan.tokens} tokens are long"
            )
        if found["kernels"]:
            yield (
                f"{len(found['kernels'])} kernels cost what their authors state, or those of "
                "attention what their shapes say"
            )
    if plan.price is None:
        yield "no price of the chip is known; --price gives one"
    else:
        yield f"a chip-hour costs {plan.price.usd_per_hour:g} USD ({plan.price.source})"


def describe_program(plan: Plan) -> str:
    """The step in words."""
    model, planned = plan.config.model, plan.config.plan
    size = f"{model.num_parameters():,} parameters in {model.param_dtype}"
    if planned.program == "prefill":
        return f"prefill of {planned.batch_size} x {planned.tokens} tokens, {size}"
    if planned.program == "decode":
        rows, tokens = planned.batch_size, planned.tokens
        return f"decode of {rows} rows, {tokens} tokens each in the cache, {size}"
    rows, length = plan.batch
    parts = plan.config.train.grad_accum_steps
    return (
        f"train on {rows:,} x {length:,} tokens in {parts} part{'s' if parts > 1 else ''}, {size}, "
        f"{plan.config.optimizer.name} with moments in {plan.config.optimizer.moments_dtype}"
        f"{' on the hosts' if plan.config.optimizer.offload else ''}, "
        f"remat {model.remat}"
    )


def labelled(label: str, texts) -> Iterator[tuple[str, str]]:
    """The texts on lines of their own, the label before the first."""
    for number, text in enumerate(texts):
        yield "" if number else label, text


def _sum(kinds: dict[str, float]) -> float:
    return sum(kinds.values())


def _amount(number: float) -> str:
    """With a prefix of the SI; a unit may follow."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.4g} {prefix}"
        number /= 1000
    return f"{number:,.4g} P"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _seconds(time: float) -> str:
    return f"{time:,.3g} s" if time >= 1 else f"{time * 1e3:,.3g} ms"


def _short(maker: str) -> str:
    """The end of an operation's path, which says what it is."""
    parts = [part for part in maker.split("/") if part not in ("while", "body", "eval_jaxpr")]
    return "/".join(parts[-3:])
