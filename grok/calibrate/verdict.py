"""A calibration in words: which kernels are right, what is slower than planned and by how much."""

from collections.abc import Iterator
from typing import Any

from grok.calibrate.kernels import KernelResult
from grok.hardware import chip_of, generation_of
from grok.ops.cpu import few_rows
from grok.plan.calibration import Calibration
from grok.plan.rates import Rates, published_rates

SLOWER = 1.1  # times as long as planned: beyond what a measurement varies by


def describe_kernels(results: list[KernelResult]) -> list[str]:
    """Lines of text: the number that are right, each that is wrong, each that cannot run here,
    and what decodes on a CPU."""
    wrong = [result for result in results if result.is_wrong]
    skipped = [result for result in results if result.skipped]
    checked = len(results) - len(skipped)
    lines = [f"{checked - len(wrong)} of {checked} kernels are right"]
    lines += [f"WRONG: {result.describe()}" for result in wrong]
    lines += [result.describe() for result in skipped]
    kernels = few_rows.describe()
    return lines if kernels is None else [*lines, kernels]


def describe_rates(calibration: Calibration) -> list[str]:
    """Every rate and step, beside what is published or planned; at the end what is slower."""
    published, compared = _published(calibration), list(_compared(calibration))
    lines = [text for text, _, _ in compared]
    if slower := [(name, ratio) for _, name, ratio in compared if ratio and ratio > SLOWER]:
        slower.sort(key=lambda item: -item[1])
        texts = [f"{name} {ratio:.2f} x" for name, ratio in slower]
        lines.append(f"slower than planned: {', '.join(texts)}")
    elif any(ratio for _, _, ratio in compared):
        lines.append(f"nothing is slower than planned by more than {SLOWER - 1:.0%}")
    if published is None and calibration.matmul_flops_per_second:
        kind = calibration.device["kind"]
        lines.append(f"no rates of a {kind} are published here: its own are what steps are beside")
    return lines


def _published(calibration: Calibration) -> Rates | None:
    generation = generation_of(calibration.device["kind"])
    return None if generation is None else published_rates(generation)


def _published_per_device(calibration: Calibration) -> tuple[float | None, ...]:
    """FLOP/s of bfloat16, bytes/s of memory and of the host link, as published; None if not."""
    published, chip = _published(calibration), chip_of(calibration.device["kind"])
    if published is None or chip is None:
        return None, None, None
    return tuple(x / chip.devices for x in (published.flops, published.hbm, published.host))


def _compared(calibration: Calibration) -> Iterator[tuple[str, str, float | None]]:
    """Each figure: a line, what it is of, and planned over measured speed where there is one."""
    peak, hbm, host = _published_per_device(calibration)
    for dtype, rate in calibration.matmul_flops_per_second.items():
        planned = peak if dtype == "bfloat16" else None
        yield _line(f"products in {dtype}", rate["median"], "FLOP/s", planned)
    for use, rate in calibration.memory_bytes_per_second.items():
        yield _line(f"memory, {use}", rate["median"], "B/s", hbm)
    for axis, measured in calibration.collectives.items():
        for kind, rate in measured["bytes_per_second"].items():
            planned = measured["planned_bytes_per_second"].get(kind)
            yield _line(f"{kind} over {axis}", rate["median"], "B/s a device", planned)
    for way, rate in (calibration.host_link_bytes_per_second or {}).items():
        yield _line(f"host link, {way}", rate["median"], "B/s a device", host)
    if calibration.dispatch_seconds:
        seconds = calibration.dispatch_seconds["median"]
        yield f"dispatch of a program: {seconds * 1e6:.0f} us", "dispatch", None
    for program, step in calibration.steps.items():
        yield _describe_step(program, step)


def _line(name: str, rate: float, unit: str, planned: float | None):
    text = f"{name}: {_amount(rate)}{unit}"
    if planned is None:
        return text, name, None
    return f"{text}, planned {_amount(planned)}{unit}", name, planned / rate


def _describe_step(program: str, step: dict[str, Any]) -> tuple[str, str, float]:
    seconds, planned = step["seconds"]["median"], step["planned_seconds"]["scheduled"]
    text = f"{program} step of {step['config']}: {_seconds(seconds)}, planned {_seconds(planned)} "
    name = f"{program} step"
    return f"{text}from the rates above: x {step['ratio']:.2f}", name, step["ratio"]


def _amount(number: float) -> str:
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:,.4g} T"


def _seconds(time: float) -> str:
    return f"{time:,.3g} s" if time >= 1 else f"{time * 1e3:,.3g} ms"
