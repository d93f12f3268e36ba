"""The time of a compiled program by its schedule: instructions one after the other as the compiler
ordered them, each as long as the resource that it uses longest, with transfers beside them that
start at one instruction and are waited for at another. Resources are "compute", "hbm", "host",
"interconnect" and "network"; a use of them is seconds by resource."""

import math
from collections import defaultdict
from collections.abc import Callable

from grok.plan.hlo import Computation, Instruction
from grok.plan.instruction_costs import is_async_collective
from grok.plan.program_cost import FREE, CompiledProgram, Cost

Use = dict[str, float]

# Resources whose time counts as work; what else an instruction takes is exposed communication.
WORK = ("compute", "hbm")


class Stretch:
    """A part of a schedule, from its first instruction to the end of its last."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.use: Use = defaultdict(float)
        # Seconds of communication alone, by what communicates.
        self.exposed: dict[str, float] = defaultdict(float)
        self.sent = 0.0  # bytes in collectives
        self.sent_beside = 0.0  # of these, in collectives that run beside other instructions

    def count(self, cost: Cost, use: Use, beside: bool) -> None:
        """Counts what a cost uses and sends."""
        sent = math.fsum(cost.collectives.values())
        self.sent += sent
        self.sent_beside += sent * beside
        for resource, needed in use.items():
            self.use[resource] += needed

    def spend(self, use: Use, label: str) -> None:
        """Appends the time that resources take, all at once."""
        seconds = _seconds(use)
        self.seconds += seconds
        if (exposed := seconds - max(use.get(resource, 0.0) for resource in WORK)) > 0:
            self.exposed[label] += exposed

    def add(self, other: "Stretch", times: float = 1) -> None:
        """Appends another stretch, so many times."""
        self.seconds += times * other.seconds
        self.sent += times * other.sent
        self.sent_beside += times * other.sent_beside
        for mine, its in ((self.use, other.use), (self.exposed, other.exposed)):
            for key, value in its.items():
                mine[key] += times * value


class _Transfers:
    """Transfers that run beside a stretch: each takes what the instructions leave of its resources,
    in the order of their starts; one that is waited for goes first."""

    def __init__(self) -> None:
        self._announced: dict[str, tuple[Use, str]] = {}  # by the instruction that starts them
        self._left: dict[str, Use] = {}

    def announce(self, name: str, use: Use, label: str) -> None:
        """Says what a transfer will use, and its label."""
        self._announced[name] = use, label

    def start(self, name: str) -> None:
        """Begins a transfer that was announced."""
        self._left[name] = dict(self._announced[name][0])

    def pass_time(self, seconds: float, use: Use) -> None:
        """Lets time pass, in which other instructions use some of the resources."""
        free = {resource: seconds - used for resource, used in use.items()}
        for left in self._left.values():
            for resource, needed in left.items():
                done = min(needed, max(0.0, free.get(resource, seconds)))
                left[resource] = needed - done
                free[resource] = free.get(resource, seconds) - done

    def unfinished(self) -> list[str]:
        """Those that nothing waited for."""
        return list(self._left)

    def finish(self, name: str) -> tuple[Use, str]:
        """Ends a transfer; returns what it still takes, a time that passes for the others, and its
        label."""
        left = self._left.pop(name, {})
        self.pass_time(_seconds(left), left)
        return left, self._announced[name][1]


class Schedule:
    """A walk through the schedule of a compiled program."""

    def __init__(self, program: CompiledProgram, use_of: Callable[[Cost], Use]):
        """`use_of`: seconds of each resource that a cost takes."""
        self._program, self._use_of = program, use_of
        self._stretches: dict[str, Stretch] = {}

    def walk(self) -> Stretch:
        """One run of the whole program."""
        return self._computation(self._program.entry)

    def _computation(self, name: str) -> Stretch:
        if name not in self._stretches:
            self._stretches[name] = self._walk(self._program.computations[name])
        return self._stretches[name]

    def _walk(self, computation: Computation) -> Stretch:
        total, transfers = Stretch(), _Transfers()
        started: dict[str, tuple[str, ...]] = {}  # transfers that an instruction's result carries
        for instruction in computation.values():
            name, carried = instruction.name, self._carried(instruction, started)
            started[name] = carried
            if _ends(instruction):
                started[name] = ()
                for start in carried:
                    total.spend(*transfers.finish(start))
            elif _begins(instruction, self._fused(instruction)):
                started[name] = (name,)
                cost = self._program.instruction_cost(computation, instruction)
                use = self._use_of(cost)
                total.count(cost, use, beside=True)
                transfers.announce(name, use, _label(instruction, cost))
                if instruction.operands:
                    transfers.start(name)
            elif instruction.opcode.endswith("-update"):  # has the operands that its start has not
                for start in carried:
                    transfers.start(start)
            else:
                part = self._part(computation, instruction)
                transfers.pass_time(part.seconds, part.use)
                total.add(part)
        for start in transfers.unfinished():
            total.spend(*transfers.finish(start))
        return total

    def _carried(self, instruction: Instruction, started: dict) -> tuple[str, ...]:
        """Transfers that the operands stand for."""
        passes_on = instruction.opcode in FREE or instruction.opcode.endswith(("-update", "-done"))
        if not passes_on and not is_async_collective(self._fused(instruction)):
            return ()
        starts = [start for name in instruction.operands for start in started.get(name, ())]
        return tuple(dict.fromkeys(starts))

    def _part(self, computation: Computation, instruction: Instruction) -> Stretch:
        """The stretch of one instruction."""
        part, opcode = Stretch(), instruction.opcode
        if opcode == "while":
            times = self._program.trip_count(computation, instruction)
            part.add(self._computation(instruction.called("body")[0]), times)
        elif opcode == "conditional":
            branches = map(self._computation, self._program.branches(instruction))
            part.add(max(branches, key=lambda stretch: stretch.seconds))
        elif opcode == "call":
            part.add(self._computation(instruction.called("to_apply")[0]))
        else:
            cost = self._program.instruction_cost(computation, instruction)
            use = self._use_of(cost)
            part.count(cost, use, beside=False)
            part.spend(use, _label(instruction, cost))
        return part

    def _fused(self, instruction: Instruction) -> Computation:
        return self._program.fused(instruction) if instruction.opcode == "fusion" else {}


def _seconds(use: Use) -> float:
    return max(use.values(), default=0.0)


def _label(instruction: Instruction, cost: Cost) -> str:
    """The collectives of an instruction, or if it has none, its copy, in words."""
    kinds = " and ".join(f"{kind} over {axes}" for axes, kind in cost.collectives)
    return f"{kinds or 'host memory'}: {instruction.op_name}"


def _begins(instruction: Instruction, fused: Computation) -> bool:
    """True if the instruction starts a transfer and does not wait for it."""
    if fused:
        return instruction.name.startswith("async-collective-start")
    return instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv")


def _ends(instruction: Instruction) -> bool:
    """True if the instruction waits for a transfer."""
    is_end = instruction.name.startswith("async-collective-done")
    return instruction.opcode.endswith("-done") or (instruction.opcode == "fusion" and is_end)
