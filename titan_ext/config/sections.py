"""Sections of ours that the trainer knows. Importable without torchtitan: the trainer imports this."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True, slots=True)
class SiteConfig:
    """Who this site is among the sites of the run."""

    name: str = "site0"
    """Name of the site: in logs, in its folder under ``dump_folder``, and towards the other sites."""

    index: int = 0
    """Place of the site in the file, from 0."""

    count: int = 1
    """Number of sites of the run."""

    weight: float = 1.0
    """The site's weight in a round's mean under ``semi_sync.weighting = "site"``."""

    labels: dict[str, str] = field(default_factory=dict)
    """What it has in common with some of the other sites, its region among them."""

    label_counts: dict[str, int] = field(default_factory=dict)
    """By key of ``labels`` the number of sites with this site's."""

    regions: list[str] = field(default_factory=list)
    """Region of each site of the file, in the order of a quorum (of their names); empty where one has none."""

    place: int = 0
    """Of this site in that order."""

    nearest: list[str] = field(default_factory=list)
    """Names of the other sites whose region has a name in common with this site's, those with most first."""


DEPT_METHOD = "local_sgd"
"""How DEPT's authors average; the method under a variant unless the user names another."""
DEPT_UNTIED = ("spec", "spec-opt")
"""Variants whose sites draw embeddings of their own."""


@dataclass(kw_only=True, slots=True)
class DeptConfig:
    """Embeddings apart from the body: DEPT (arXiv 2410.05021)."""

    variant: Literal["none", "glob", "trim", "spec", "spec-opt"] = "none"
    """Who shares the token embeddings and the head: all sites whole ("glob"), each row the sites whose text has the
    token ("trim"), or nobody, with the rows of the site's text ("spec") or a tokenizer of its own ("spec-opt")."""

    embeddings: list[str] = field(default_factory=lambda: ["tok_embeddings.*", "lm_head.*"])
    """Patterns of the parameters that have a row for each token."""

    vocabulary_multiple: int = 64
    """A table's rows are rounded up to a multiple of this; those without a token have no part in the softmax."""


@dataclass(kw_only=True, slots=True)
class FoMoEConfig:
    """Experts shared out over the sites: FoMoE (arXiv 2606.19025)."""

    sites_per_expert: int = 0
    """Sites that hold each expert; a site skips those that it does not hold. 0: all sites hold all experts."""


@dataclass(kw_only=True, slots=True)
class SiteHeader:
    """Keys of a ``[[site]]`` table that are not sections."""

    name: str
    """Letters, digits, ``.``, ``_`` and ``-``; unique in the file."""

    index: int | None = None
    """Place among the sites; by default the place in the file. For a file that describes one site of a larger run."""

    count: int | None = None
    """Sites of the run; by default those of the file."""

    weight: float = 1.0
    """Weight in a round's mean under ``semi_sync.weighting = "site"``."""

    region: str | None = None
    """Where the site is in the tree of sites: a path of at most three names such as ``eu/de``. The sites of a region are
    close to each other; see ``semi_sync.topology`` and ``semi_sync.region_sync_every``."""

    labels: dict[str, str] = field(default_factory=dict)
    """What the site has in common with some of the others, such as ``{ language = "de", modality = "speech" }``: parameters
    of a scope with ``shared = "group"`` and ``group = "language"`` are averaged among the sites of one language."""

    tokenizer: str = "byte"
    """``byte``, a folder that holds ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``, or ``vocab.txt``), or the
    path of one."""

    vocabulary: str | None = None
    """File with the part of the tokenizer's vocabulary that the site holds (``titan-ext data vocab`` writes it), or
    ``auto``: found in the site's text at its first start; ``auto`` under ``dept.variant`` "trim" and "spec"."""

    nproc: int | None = None
    """Ranks of the site; by default the product of its parallel degrees."""

    nodes: int = 1
    """Machines of the site, each with as many of its ranks. Each runs a launcher of its own; ``titan-ext launch
    --local-nodes N`` rehearses them on one machine."""

    nproc_per_node: int | None = None
    """Ranks at each node: ``nproc`` divided by ``nodes``, of which one may be left out."""

    rendezvous_port: int | None = None
    """Port of the site's store: at its first node, where its nodes meet and other sites' ranks look each other up.
    Unset: 29500 for a site of several nodes, and a free one for a site of one."""

    hf_assets_path: str | None = None
    """Folder with Hugging Face weights and ``config.json``; by default the tokenizer's folder."""


@dataclass(kw_only=True, slots=True)
class RegionHeader:
    """Keys of a ``[[region]]`` table that are not sections; the sections count for every site of the region."""

    name: str
    """Letters, digits, ``.``, ``_`` and ``-``."""

    parent: str | None = None
    """Path of the region that it is a part of; by default none."""
