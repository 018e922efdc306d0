"""Training settings of each flavor, and torchtitan's own entry point:
``--module titan_ext.models.dept --config dept_125m``.

The recipe of a source, on which its site trains. How sites meet is ``[semi_sync]``'s: in the paper by the plain mean
every 500 steps.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from titan_ext.models.dept import flavors, model_registry
from titan_ext.models.llama3 import config_registry as llama3


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    lr: float
    steps: int
    batch: int
    """Sequences a step."""


# Learning rates and batches are those of the recipes that the paper names; for the largest model its batch is not
# known. Steps are its table 9.
_RECIPES = {
    "125M": _Recipe(lr=6e-4, steps=5_000, batch=256),
    "350M": _Recipe(lr=3e-4, steps=13_500, batch=256),
    "1.3B": _Recipe(lr=2e-4, steps=7_000, batch=512),
}
_SMALL_LR = 3e-3
_SEQUENCE, _WARM_UP = 2048, 100


def _config(flavor: str) -> Any:
    base = llama3.llama3_debugmodel()
    recipe = _RECIPES.get(flavor)
    spec = model_registry(flavor)
    (group,) = base.optimizer.param_groups
    settings = group.optimizer_kwargs | {"lr": recipe.lr if recipe else _SMALL_LR, "weight_decay": 0.0}
    config = replace(
        base,
        model_spec=spec,
        loss=replace(base.loss, loss_fn=replace(base.loss.loss_fn, global_vocab_size=spec.model.vocab_size)),
        optimizer=replace(base.optimizer, param_groups=[replace(group, optimizer_kwargs=settings)]),
        lr_scheduler=replace(base.lr_scheduler, decay_type="cosine", min_lr_factor=0.1),
    )
    return config if recipe is None else _papers_run(config, recipe)


def _papers_run(config: Any, recipe: _Recipe) -> Any:
    return replace(
        config,
        training=replace(
            config.training, steps=recipe.steps, global_batch_size=recipe.batch, seq_len=_SEQUENCE, max_norm=1.0
        ),
        lr_scheduler=replace(config.lr_scheduler, warmup_steps=_WARM_UP),
    )


globals().update({f"dept_{flavor.lower().replace('.', '_')}": partial(_config, flavor) for flavor in flavors})
