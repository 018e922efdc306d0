"""The ``[fomoe]`` section: which site holds which experts, and what that means for scopes and costs (arXiv 2606.19025)."""

from typing import Any

import torch

from titan_ext.config.findings import TO_BUILD
from titan_ext.config.sections import FoMoEConfig, SiteConfig
from titan_ext.config.settings import Settings
from titan_ext.models.held_experts import PATTERN, held_experts, row_widths
from titan_ext.semi_sync.plan.scopes import ScopeConfig
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap

_SCOPE = "experts"


def expert_scopes(settings: Settings, fomoe: FoMoEConfig, model: Any, given: list[ScopeConfig]) -> list[ScopeConfig]:
    """The scopes of ``[semi_sync]`` with those by which held experts are shared, one for each width of a row.

    Args:
        settings: for the wording of errors.
        fomoe: the section.
        model: torchtitan's config of the site's model.
        given: scopes that the user wrote; none may be called "experts".

    Raises:
        UserError: one is.
    """
    if not fomoe.sites_per_expert:
        return given
    if any(scope.name.startswith(_SCOPE) for scope in given):
        problem = f'a scope called "{_SCOPE}" is [fomoe]\'s own; call yours otherwise'
        raise settings.error("semi_sync.scopes", problem, _SCOPE)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in model.build().named_parameters()}
    leaves: dict[int, list[str]] = {}
    for name, width in row_widths(shapes).items():
        pattern = PATTERN.removesuffix("*") + name.rpartition(".")[2]
        if pattern not in leaves.setdefault(width, []):
            leaves[width].append(pattern)
    scopes = [
        ScopeConfig(name=f"{_SCOPE}{place or ''}", parameters=patterns, shared="sparse_rows")
        for place, patterns in enumerate(leaves.values())
    ]
    return [*scopes, *given]


def expert_rows(fomoe: FoMoEConfig, site: SiteConfig, model: Any, scopes: list[ScopeConfig]) -> dict[str, TokenRowMap]:
    """For each scope of experts, which expert each row of the site's tables is; empty without the section."""
    if not fomoe.sites_per_expert:
        return {}
    rows = _row_map(fomoe, site.index, site.count, _experts_of(model))
    return {scope.name: rows for scope in scopes if scope.name.startswith(_SCOPE) and scope.shared == "sparse_rows"}


def _row_map(fomoe: FoMoEConfig, index: int, sites: int, total: int) -> TokenRowMap:
    held = held_experts(total, fomoe.sites_per_expert, index, sites)
    return TokenRowMap(torch.tensor(held), total, f"experts, {fomoe.sites_per_expert} sites each")


def _experts_of(model: Any) -> int:
    """Experts of a layer, at all sites."""
    from torchtitan.models.common.moe import MoE

    return next(moe.num_experts for _, moe, _, _ in model.traverse(MoE.Config))


def holders(fomoe: FoMoEConfig, sites: int, model: Any) -> torch.Tensor:
    """Which site holds which expert: bool ``[sites, experts]``."""
    total = _experts_of(model)
    found = torch.zeros(sites, total, dtype=torch.bool)
    for index in range(sites):
        found[index, list(held_experts(total, fomoe.sites_per_expert, index, sites))] = True
    return found


def describe_fomoe(site: Any) -> list[str]:
    """What a ``Site`` holds of the experts and of their memory, in lines."""
    fomoe = site.config.fomoe
    if not fomoe.sites_per_expert or any(each.need in TO_BUILD for each in site.missing):
        return []
    from titan_ext.config.model import parameter_shapes

    model = site.config.model_spec.model
    total, held = _experts_of(model), int(holders(fomoe, site.count, model)[site.index].sum())
    own = sum(held * width for width in row_widths(parameter_shapes(site.config)).values())
    whole = own * total // held
    return [
        "  fomoe".ljust(19) + f"{held} of {total} experts of a layer, {fomoe.sites_per_expert} site(s) each: {own:,} of"
        f" {whole:,} parameters of experts, {4 * own / 2**20:,.1f} of {4 * whole / 2**20:,.1f} MiB in fp32"
    ]
