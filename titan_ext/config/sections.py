"""Sections of ours that the trainer knows. Importable without torchtitan: the trainer imports this."""

from dataclasses import dataclass


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

    tokenizer: str = "byte"
    """``byte``, a folder that holds ``tokenizer.json``, or the path of one."""

    nproc: int | None = None
    """Ranks of the site; by default the product of its parallel degrees."""

    hf_assets_path: str | None = None
    """Folder with Hugging Face weights and ``config.json``; by default the tokenizer's folder."""
