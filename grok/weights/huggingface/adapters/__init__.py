"""The model families on Hugging Face; a new one is a file here and an entry in ADAPTERS."""

from collections.abc import Collection

from grok.weights.huggingface.adapters.adapter import Adapter
from grok.weights.huggingface.adapters.grok_1 import Grok1

ADAPTERS: tuple[Adapter, ...] = (Grok1(),)
# The family that exports are written for.
EXPORT_ADAPTER = ADAPTERS[0]


def adapter_of(names: Collection[str]) -> tuple[Adapter, str] | None:
    """The adapter and the layout that tensors of these names are in, if any is known."""
    for adapter in ADAPTERS:
        layout = adapter.layout_of(names)
        if layout is not None:
            return adapter, layout
    return None
