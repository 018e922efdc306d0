"""torchtitan's Llama 3 model, able to train on a machine without an accelerator."""

from dataclasses import dataclass

from torchtitan.models.llama3 import model as torchtitan_llama3

from titan_ext.models.attention import PackedDocuments


class Llama3Model(PackedDocuments, torchtitan_llama3.Llama3Model):
    """torchtitan's model; only the source of its attention masks differs."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_llama3.Llama3Model.Config):
        pass
