"""The ``[dept]`` section: what a variant of DEPT means for scopes, vocabulary and model (arXiv 2410.05021)."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from titan_ext.config.findings import TO_BUILD, Need
from titan_ext.config.sections import DeptConfig
from titan_ext.config.settings import Settings
from titan_ext.errors import UserError
from titan_ext.semi_sync.plan.fragments import matches
from titan_ext.semi_sync.plan.scopes import ScopeConfig

SCOPE = "embeddings"
"""Name of the scope that a variant lays out."""

AUTO = "auto"
_FILE = "vocabulary.json"
# GLOB shares the whole table, and any tokenizer of a site's own goes with SPEC-OPT.
_TRIMMED = ("trim", "spec")
_SHARED: dict[str, Literal["sparse_rows", "local"]] = {"trim": "sparse_rows", "spec": "local", "spec-opt": "local"}


def own_vocabulary(dept: DeptConfig) -> bool:
    """Whether the sites' embeddings may differ in their rows."""
    return dept.variant in _SHARED


def variant_scopes(settings: Settings, dept: DeptConfig, given: list[ScopeConfig]) -> list[ScopeConfig]:
    """The scopes of ``[semi_sync]`` under the variant.

    Args:
        settings: for the wording of errors.
        dept: the section.
        given: scopes that the user wrote; one named "embeddings" takes the variant's place in detail.

    Raises:
        UserError: the user's scope of that name shares the embeddings in another way.
    """
    if dept.variant not in _SHARED:
        return given
    own = ScopeConfig(name=SCOPE, parameters=dept.embeddings, shared=_SHARED[dept.variant])
    named = next((scope for scope in given if scope.name == SCOPE), None)
    if named is None:
        return [own, *given]
    if named.shared != own.shared:
        problem = f'must be "{own.shared}" for scope "{SCOPE}" with dept.variant = "{dept.variant}"'
        raise settings.error("semi_sync.scopes", problem, named.shared)
    return given


def asked_vocabulary(dept: DeptConfig, given: str | None) -> str:
    """What the user, or else the variant, says of the part of the tokenizer's vocabulary; empty for all of it."""
    return given or (AUTO if dept.variant in _TRIMMED else "")


def vocabulary_file(settings: Settings, dept: DeptConfig, given: str | None, *, site_folder: Path) -> str:
    """Path of the file with the part of the tokenizer's vocabulary that the site holds; empty for all of it.

    Raises:
        Missing: the file is not there; with "auto", the variant's default where it needs one, ``find_vocabulary``
            writes it.
    """
    given = asked_vocabulary(dept, given)
    if not given:
        return ""
    path = site_folder / _FILE if given == AUTO else Path(given)
    if path.expanduser().exists():
        return str(path)
    if given != AUTO:
        raise settings.missing(Need.TOKENIZER, "vocabulary", "no such file", given)
    problem = f"not found yet: the first start reads the site's text and writes {path}; until then all tokens count"
    raise settings.missing(Need.VOCABULARY, "vocabulary", problem, given)


def find_vocabulary(site: Any) -> bool:
    """Find the vocabulary of a ``Site`` in its training documents, where it is to be found there and has not been.

    It is written into the site's folder once, by one process of the machine; the others wait.

    Returns:
        whether the site has to be loaded anew, with the vocabulary.

    Raises:
        UserError: the tokenizer or the corpus cannot be read, or the file is of another tokenizer.
    """
    if not any(each.need is Need.VOCABULARY for each in site.missing):
        return False
    from titan_ext.data.loader import open_feed
    from titan_ext.data.tokenizers.tokenizer import build_tokenizer
    from titan_ext.data.tokenizers.vocabulary import find_vocabulary as find
    from titan_ext.data.tokenizers.vocabulary_file import site_vocabulary

    try:
        whole = build_tokenizer(site.tokenizer)
        feed = open_feed(replace(site.config.dataloader, infinite=False))
        path = Path(site.config.dump_folder) / _FILE
        site_vocabulary(path, lambda: find(feed, whole, progress=_tell), tokenizer=whole)
    except UserError as error:
        raise site.settings.error("vocabulary", str(error), AUTO) from None
    return True


def describe_dept(site: Any) -> list[str]:
    """What the variant holds and sends of a ``Site``'s model, by the formulas of the paper's table 1; in lines."""
    dept = site.config.dept
    if dept.variant == "none" or any(each.need in TO_BUILD for each in site.missing):
        return []
    from titan_ext.config.model import parameter_shapes
    from titan_ext.data.tokenizers.tokenizer import vocabulary_size
    from titan_ext.models.dept.cost import ModelSize, parameters_held, payload_a_step

    model = site.config.model_spec.model
    shapes = parameter_shapes(site.config)
    body = sum(shape.numel() for name, shape in shapes.items() if not matches(name, dept.embeddings))
    size = ModelSize(
        body=body,
        dim=model.dim,
        vocabulary=vocabulary_size(site.tokenizer),
        tied=model.enable_weight_tying,
    )
    own = vocabulary_size(site.tokenizer, site.vocabulary)
    every = site.config.semi_sync.sync_every or 1
    held, whole = (parameters_held(variant, size, own) for variant in (dept.variant, "glob"))
    sent, glob, std = (payload_a_step(method, size, own, every) for method in (dept.variant, "glob", "std"))
    rows = f"{own:,} tokens of its own" if dept.variant == "spec-opt" else f"{own:,} of {size.vocabulary:,} tokens"
    return [
        f"  dept.{dept.variant}".ljust(19) + f"{rows}; holds {held:,} parameters ({held / whole:.3g} of glob), sends"
        f" {sent:,.0f} a step ({sent / glob:.3g} of glob, {sent / std:.2g} of data parallelism); by formula, padding aside"
    ]


def check_dept(settings: Settings, dept: DeptConfig, model: Any) -> None:
    """Refuse a variant whose embeddings the model does not have apart.

    Args:
        model: torchtitan's config of the model.

    Raises:
        UserError: naming the key.
    """
    if dept.vocabulary_multiple < 1:
        raise settings.error("dept.vocabulary_multiple", "must be at least 1", dept.vocabulary_multiple)
    if dept.variant != "none" and not hasattr(model, "lm_head"):
        raise settings.error("dept.variant", "needs a decoder with tok_embeddings and lm_head", dept.variant)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
