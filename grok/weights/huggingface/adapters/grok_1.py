"""Names and shapes of Grok-1's tensors on Hugging Face: two repositories, two layouts.

A layer's tensors are one each there, an expert's too; ours are stacked. The weights of a linear
layer are [out, in], the transpose of ours, with heads and their width as one axis.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from grok.config import GrokConfig
from grok.model import params

HPCAI = "hpcai-tech/grok-1"
KEYFAN = "keyfan/grok-1-hf"
# The same in both: the token table once more, as the weights of the last linear layer.
LM_HEAD = "lm_head.weight"


def _in_layer(prefix: str, suffixes: dict[str, str]) -> dict[str, str]:
    return {f"layers/{ours}": prefix + theirs for ours, theirs in suffixes.items()}


# Our names to theirs, in the order in which exports write them.
LAYOUTS = {
    HPCAI: {
        "embed/table_VD": "model.embed_tokens.weight",
        **_in_layer(
            "model.layers.{layer}.",
            {
                "pre_attn_norm/scale_D": "pre_attn_norm.scale",
                "attention/w_query_DNH": "attn.q_proj.weight",
                "attention/w_key_DKH": "attn.k_proj.weight",
                "attention/w_value_DKH": "attn.v_proj.weight",
                "attention/w_out_NHD": "attn.o_proj.weight",
                "post_attn_norm/scale_D": "post_attn_norm.scale",
                "pre_moe_norm/scale_D": "pre_moe_norm.scale",
                "moe/router_DE": "moe_block.gate.weight",
                "moe/w_gate_EDF": "moe_block.experts.{expert}.linear.weight",
                "moe/w_up_EDF": "moe_block.experts.{expert}.linear_v.weight",
                "moe/w_down_EFD": "moe_block.experts.{expert}.linear_1.weight",
                "post_moe_norm/scale_D": "post_moe_norm.scale",
            },
        ),
        "final_norm/scale_D": "model.norm.scale",
    },
    KEYFAN: {
        "embed/table_VD": "transformer.in_out_embed.weight",
        **_in_layer(
            "transformer.decoder_layer.{layer}.",
            {
                "pre_attn_norm/scale_D": "rms_norm.weight",
                "attention/w_query_DNH": "multi_head_attention.query.weight",
                "attention/w_key_DKH": "multi_head_attention.key.weight",
                "attention/w_value_DKH": "multi_head_attention.value.weight",
                "attention/w_out_NHD": "multi_head_attention.linear.weight",
                "post_attn_norm/scale_D": "rms_norm_1.weight",
                "pre_moe_norm/scale_D": "rms_norm_2.weight",
                "moe/router_DE": "router.weight",
                "moe/w_gate_EDF": "moe.{expert}.linear.weight",
                "moe/w_up_EDF": "moe.{expert}.linear_v.weight",
                "moe/w_down_EFD": "moe.{expert}.linear_1.weight",
                "post_moe_norm/scale_D": "rms_norm_3.weight",
            },
        ),
        "final_norm/scale_D": "transformer.rms_norm.weight",
    },
}
# A name that only one layout has, among the many of any folder of that layout.
TELLING = {
    HPCAI: re.compile(r"model\.layers\.\d+\.(attn|moe_block)\."),
    KEYFAN: re.compile(r"transformer\.decoder_layer\.\d+\."),
}
# What is transposed there, and how its axes divide.
LINEAR = params.MATRICES | {"layers/moe/router_DE": params.Matrix(1, 1)}


@dataclasses.dataclass(frozen=True)
class HuggingFaceTensor:
    """One of their tensors: what it is called there, and which part of a parameter it is.

    `lead` is the layer and expert, as far as the parameter `tree_name` has them; `shape` is theirs.
    """

    name: str
    tree_name: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether it is [out, in]."""
        return self.tree_name in LINEAR


def layout_of(found: Iterable[str]) -> str | None:
    """The layout that these tensors are named in, if it is one of the two."""
    for name in found:
        for layout, telling in TELLING.items():
            if telling.match(name):
                return layout
    return None


def tensors(layout: str, config: GrokConfig) -> Iterator[HuggingFaceTensor]:
    """All tensors of a layout but LM_HEAD, which need not be there: table, layers, final norm."""
    shapes = params.shapes(config)

    def one(tree_name: str, layer: int | None = None, expert: int | None = None):
        name = LAYOUTS[layout][tree_name].format(layer=layer, expert=expert)
        lead = tuple(index for index in (layer, expert) if index is not None)
        return HuggingFaceTensor(name, tree_name, lead, their_shape(tree_name, shapes[tree_name]))

    yield one("embed/table_VD")
    for layer in range(config.num_layers):
        for tree_name, name in LAYOUTS[layout].items():
            if "{expert}" in name:
                for expert in range(config.num_experts):
                    yield one(tree_name, layer, expert)
            elif "{layer}" in name:
                yield one(tree_name, layer)
    yield one("final_norm/scale_D")


def their_shape(tree_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of one layer and expert of a parameter of `shape`."""
    _, rows, columns = split(tree_name, shape)
    return (math.prod(columns), math.prod(rows)) if tree_name in LINEAR else rows


def split(tree_name: str, axes: tuple) -> tuple[tuple, tuple, tuple]:
    """A parameter's axes, or what there is for each: those of layer and expert, rows, columns.

    What is not transposed there is all rows.
    """
    if tree_name not in LINEAR:
        lead = int(tree_name.startswith("layers/"))
        return axes[:lead], axes[lead:], ()
    matrix = LINEAR[tree_name]
    columns = len(axes) - matrix.col_dims
    lead = columns - matrix.row_dims
    return axes[:lead], axes[lead:columns], axes[columns:]
