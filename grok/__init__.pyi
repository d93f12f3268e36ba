"""Types of the public names, for editors; tests hold it beside `__init__.py`."""

from grok.api.llm import LLM as LLM
from grok.api.llm import CompletionOutput as CompletionOutput
from grok.api.llm import TextScore as TextScore
from grok.api.training import batches as batches
from grok.api.training import init_state as init_state
from grok.api.training import mesh_for as mesh_for
from grok.api.training import save_checkpoint as save_checkpoint
from grok.compiler import jit as jit
from grok.config import ModelConfig as ModelConfig
from grok.config import RunConfig as RunConfig
from grok.config.load import load_config as load_config
from grok.config.sampling import SamplingParams as SamplingParams
from grok.data.tokenizers import Tokenizer as Tokenizer
from grok.data.tokenizers import load_tokenizer as load_tokenizer
from grok.errors import GrokError as GrokError
from grok.infer.request import TokenLogprobs as TokenLogprobs
from grok.model.build import init as init
from grok.model.decoder import Decoder as Grok
from grok.optim.optimizer import make_optimizer as make_optimizer
from grok.sharding import make_mesh as make_mesh
from grok.train.state import TrainState as TrainState
from grok.train.step import train_step as train_step
from grok.weights.load import load as load

__version__: str
