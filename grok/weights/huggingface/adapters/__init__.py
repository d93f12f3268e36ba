"""The model families on Hugging Face; a new one is a file here and an entry in ADAPTERS."""

from grok.weights.huggingface.adapters.adapter import Adapter
from grok.weights.huggingface.adapters.grok_1 import Grok1

ADAPTERS: tuple[Adapter, ...] = (Grok1(),)
# The family that exports are written for.
EXPORT_ADAPTER = ADAPTERS[0]
