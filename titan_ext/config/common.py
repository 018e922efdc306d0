"""What sites that exchange must have in common, by configuration key: to compare, and to name a difference by."""

import dataclasses
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.config.cost.inner_states import InnerStates
from titan_ext.config.model import parameter_shapes
from titan_ext.config.outer_loop import plan_of
from titan_ext.config.resolved import known_sizes
from titan_ext.data.tokenizers.traits import token_rows
from titan_ext.semi_sync.bind import averages_state
from titan_ext.semi_sync.plan.fragments import matches
from titan_ext.semi_sync.plan.scopes import assign
from titan_ext.semi_sync.state.group_parameters import WithGroup
from titan_ext.semi_sync.state.sparse_tables import SparseRows

# Of a model: its rows are the tokenizer's, its positions those of the sequences.
_NOT_COMPUTED = {"vocab_size", "max_seq_len"}
# What the optimizer's states do not depend on but for their rounding.
_SITES_OWN = {"lr", "weight_decay", "eps", "adamw_lr", "state_dtype"}


def beside_outer_loop(config: Any) -> dict[str, Any]:
    """Settings outside of ``[semi_sync]`` that must be equal at all sites.

    Args:
        config: a site's ``Trainer.Config`` with an outer loop.
    """
    # All take the same steps: a site with fewer would leave the others waiting for it at their end.
    steps = {"training.steps": config.training.steps}
    return steps | _computation(config) | _sources(config) | _moments(config) | _own_quorums(config)


def shares_token_rows(config: Any) -> bool:
    """Whether all sites share parameters that have a row for each token, row by row."""
    plan = plan_of(config)
    home = assign({name: shape.numel() for name, shape in parameter_shapes(config).items()}, plan)
    apart = {scope.name for scope in plan.scopes if not scope.shared}
    apart |= {rule.scope for rule in plan.rules if isinstance(rule.apply, (SparseRows, WithGroup))}
    return any(matches(name, config.dept.embeddings) and place[0] not in apart for name, place in home.items())


def shared_tokens(config: Any, tokenizer: BaseTokenizer) -> dict[str, str]:
    """Which tokens the rows stand for that all sites share, if they share any."""
    return {"tokenizer": token_rows(tokenizer)} if shares_token_rows(config) else {}


def has_region_quorum(config: Any) -> bool:
    """Whether the site's region has a quorum of its own, for averages of its own."""
    return config.semi_sync.region_sync_every is not None and config.replica.region_lighthouse is not None


def behind_model(config: Any) -> dict[str, Any]:
    """Settings that a model, its layout and the form of what it sends are made of."""
    spec, parallelism = config.model_spec, dataclasses.asdict(config.parallelism)
    sizes = known_sizes(spec.model) or {"flavor": spec.flavor}
    degrees = {key: value for key, value in parallelism.items() if key.endswith("_degree")}
    return {
        "model.name": spec.name,
        **{f"model.{key}": value for key, value in sizes.items()},
        **{f"parallelism.{key}": value for key, value in degrees.items()},
        "training.dtype": config.training.dtype,
    }


def _computation(config: Any) -> dict[str, Any]:
    """What a model computes beside what the shapes of its tensors say, as far as its config tells."""
    model = config.model_spec.model
    own = {each.name: getattr(model, each.name) for each in dataclasses.fields(model)}
    plain = {key: value for key, value in own.items() if isinstance(value, (bool, int, float, str))}
    known = {key: value for key, value in {**plain, **known_sizes(model)}.items() if key not in _NOT_COMPUTED}
    return {"model.name": config.model_spec.name, **{f"model.{key}": value for key, value in known.items()}}


def _sources(config: Any) -> dict[str, Any]:
    """Data sources that any site can have, in the order in which they are drawn and placed."""
    if config.semi_sync.source_placement != "pollen":
        return {}
    return {"data.source": [(source.name, source.weight) for source in config.dataloader.all_sources()]}


def _own_quorums(config: Any) -> dict[str, Any]:
    """That regions meet at lighthouses of their own, all of them or none: by it sites know when to come to which quorum."""
    return {"replica.region_lighthouse": "set"} if has_region_quorum(config) else {}


def _moments(config: Any) -> dict[str, Any]:
    """What the inner optimizer's states mean, where sites average them."""
    if not any(averages_state(rule) for rule in plan_of(config).rules):
        return {}
    found: dict[str, Any] = {}
    groups, settings = config.optimizer.param_groups, InnerStates(config.optimizer).hyper_parameters
    for place, (group, values) in enumerate(zip(groups, settings, strict=True)):
        if [each.pattern for each in groups] == [".*"]:
            name, prefix = "optimizer.name", "optimizer."
        else:
            key = f"optimizer.param_groups[{place}]"
            name, prefix = f"{key}.optimizer_name", f"{key}.optimizer_kwargs."
            found[f"{key}.pattern"] = group.pattern
        found[name] = group.optimizer_name
        found |= {prefix + key: value for key, value in values.items() if key not in _SITES_OWN}
    switch = dataclasses.asdict(config.optimizer_switch)
    return found | {f"optimizer_switch.{key}": value for key, value in switch.items()}
