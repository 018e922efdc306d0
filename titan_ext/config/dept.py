"""The ``[dept]`` section: what a variant of DEPT means for scopes, vocabulary and model (arXiv 2410.05021)."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_ext.config.binder import Binder
from titan_ext.config.sections import DeptConfig
from titan_ext.config.settings import Settings
from titan_ext.errors import UserError
from titan_ext.semi_sync.scopes import ScopeConfig

SCOPE = "embeddings"
"""Name of the scope that a variant lays out."""

AUTO = "auto"
_FILE = "vocabulary.json"
# GLOB shares the whole table, and any tokenizer of a site's own goes with SPEC-OPT.
_TRIMMED = ("trim", "spec")
_SHARED = {"trim": "rows", "spec": "no", "spec-opt": "no"}


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


def vocabulary_file(
    settings: Settings, dept: DeptConfig, given: str | None, *, tokenizer: str, site_folder: Path
) -> str:
    """Path of the file with the part of the tokenizer's vocabulary that the site holds; empty for all of it.

    With "auto", the variant's default where it needs one, it is found in the site's training documents once, and
    kept with what the site leaves.

    Raises:
        UserError: the tokenizer or the corpus cannot be read, or the file is of another tokenizer.
    """
    given = given or (AUTO if dept.variant in _TRIMMED else "")
    if given != AUTO:
        return given
    from titan_ext.data.loader import TextDataLoader, open_feed
    from titan_ext.data.tokenizer import build_tokenizer
    from titan_ext.data.vocabulary import find_vocabulary
    from titan_ext.data.vocabulary_file import site_vocabulary

    data = Binder(settings).section("data", TextDataLoader.Config)
    path = site_folder / _FILE
    try:
        data.validate()
        whole = build_tokenizer(tokenizer)
        feed = open_feed(replace(data, infinite=False))
        site_vocabulary(path, lambda: find_vocabulary(feed, whole, progress=_tell), tokenizer=whole)
    except UserError as error:
        raise settings.error("vocabulary", str(error), given) from None
    return str(path)


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
