"""Refusals and failures of the TPU's compiler, each in a sentence with a remedy."""

import re

from grok.config import RunConfig
from grok.errors import GrokError

# Vector memory of a core, which a kernel's blocks fill; not the HBM of the chip.
_VMEM = re.compile(r"ScopedVmemOom|memory space vmem|\bE1001\b|scoped vmem", re.IGNORECASE)
_LONGEST = 400  # characters of the compiler's words


def is_out_of_hbm(message: str) -> bool:
    """True if the compiler says that the program needs more HBM than there is."""
    return "RESOURCE_EXHAUSTED" in message and not _VMEM.search(message)


def compiler_error(message: str, config: RunConfig, mesh_sizes: dict[str, int]) -> GrokError:
    """The error for people of a message that is not about HBM."""
    words = _words(message)
    narrower = f"mesh.expert={2 * mesh_sizes['expert']} or mesh.tensor={2 * mesh_sizes['tensor']}"
    if _VMEM.search(message):
        problem = "a kernel needs more vector memory than a core has, whatever the HBM"
        fix = f"narrower experts on a chip, as by {narrower}, need less"
        return GrokError(f'{problem}; the compiler says "{words}"; {fix}.')
    tries = [f"another mesh, as by {narrower}", "another version of libtpu"]
    if config.plan.program == "train" and config.train.grad_accum_steps > 1:
        tries.insert(0, "train.grad_accum_steps=1 with a smaller data.batch_size")
    problem = f'the TPU\'s compiler failed on this program, with "{words}"'
    return GrokError(f"{problem}; {', or '.join(tries)}, may work.")


def crash_error(signal_name: str, output: str) -> GrokError:
    """The error for people where the compiler's process died of a signal."""
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "nothing")
    problem = f"the TPU's compiler crashed ({signal_name}); its last words are"
    return GrokError(f'{problem} "{_words(last)}"; another mesh may work.')


def _words(message: str) -> str:
    """The first paragraph of a message, on one line."""
    paragraph = re.split(r"\n\s*\n", message.strip())[0]
    text = " ".join(paragraph.replace('"', "'").split()).rstrip(".;")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
