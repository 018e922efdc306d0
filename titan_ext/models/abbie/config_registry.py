"""Training settings of each flavor, and torchtitan's own entry point:
``--module titan_ext.models.abbie --config abbie_tiny``.

AdamW as for Llama 3, and the papers' schedule: warm up, stay, decay. Learning rates and the length of the decay are
our choice, for the paper's are not known.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from titan_ext.models.abbie import flavors, model_registry
from titan_ext.models.llama3 import config_registry as llama3

_LEARNING_RATES = {"micro": 1e-2, "tiny": 3e-3, "debugmodel": 3e-3, "200M": 6e-4, "350M": 3e-4}
_DECAY_RATIO = 0.2


def _config(flavor: str) -> Any:
    spec = model_registry(flavor)
    base = llama3.llama3_debugmodel()
    loss = replace(base.loss.loss_fn, global_vocab_size=spec.model.vocab_size)
    group = base.optimizer.param_groups[0]
    rate = _LEARNING_RATES[flavor.split("-")[0]]
    return replace(
        base,
        model_spec=spec,
        loss=replace(base.loss, loss_fn=loss),
        optimizer=replace(
            base.optimizer,
            param_groups=[replace(group, optimizer_kwargs=group.optimizer_kwargs | {"lr": rate})],
        ),
        lr_scheduler=replace(base.lr_scheduler, decay_ratio=_DECAY_RATIO),
    )


globals().update({f"abbie_{flavor.lower().replace('-', '_')}": partial(_config, flavor) for flavor in flavors})
