"""torchtitan's Llama 3 model, able to train on a machine without an accelerator."""

from dataclasses import dataclass
from functools import partial

from torch import nn
from torchtitan.models.llama3 import model as torchtitan_llama3
from torchtitan.models.utils import get_dense_model_nparams_and_flops

from titan_ext.models.attention import PackedDocuments
from titan_ext.models.capabilities import Capabilities
from titan_ext.models.llama3.huggingface import sizes_of


class Llama3Model(PackedDocuments, torchtitan_llama3.Llama3Model):
    """torchtitan's model; the source of its attention masks differs, and operations are counted for any head width."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_llama3.Llama3Model.Config):
        @property
        def attention_width(self) -> int:
            """Width of all query heads together; ``dim`` unless a head's width is named."""
            attention = self.layers[0].attention
            return attention.n_heads * attention.head_dim if attention.head_dim else self.dim

        def capabilities(self) -> Capabilities:
            """A decoder that may tie its head."""
            return Capabilities(ties=self.enable_weight_tying, sizes=partial(sizes_of, self))

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, each once, and floating-point operations of training on a token, for heads of any width."""
            return get_dense_model_nparams_and_flops(
                model,
                n_layers=len(self.layers),
                n_heads=1,
                head_dims=2 * self.attention_width,
                seq_len=seq_len,
                enable_weight_tying=self.enable_weight_tying,
            )
