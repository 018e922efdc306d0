"""Configurations for torchtitan's own entry point: ``--module titan_ext.models.llama3 --config llama3_8b``.

They name no sites: without further flags a run is one site that looks for a lighthouse in the
TORCHFT_LIGHTHOUSE variable.
"""

from titan_ext.models.llama3 import model_registry


def llama3_tiny():
    """Some hundred thousand parameters on bytes, for a first look."""
    return _config("tiny")


def llama3_debugmodel():
    """torchtitan's debug size."""
    return _config("debugmodel")


def llama3_125m():
    """The size of the papers' small runs."""
    return _config("125M")


def llama3_1b():
    """Llama 3.2 1B."""
    return _config("1B")


def llama3_3b():
    """Llama 3.2 3B."""
    return _config("3B")


def llama3_8b():
    """Llama 3.1 8B."""
    return _config("8B")


def llama3_70b():
    """Llama 3.1 70B."""
    return _config("70B")


def llama3_405b():
    """Llama 3.1 405B."""
    return _config("405B")


def _config(flavor: str):
    # The trainer imports configurations of every part; torchtitan imports this module first.
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import ParamGroupConfig

    from titan_ext.data import TextDataLoader
    from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
    from titan_ext.trainer.optimizers import OptimizersContainer
    from titan_ext.trainer.trainer import Trainer

    spec = model_registry(flavor)
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)),
        optimizer=OptimizersContainer.Config(
            param_groups=[
                ParamGroupConfig(
                    pattern=".*",
                    optimizer_name="AdamW",
                    optimizer_kwargs={"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
                )
            ]
        ),
        tokenizer=ByteTokenizer.Config(),
        dataloader=TextDataLoader.Config(dataset="builtin:code"),
    )
