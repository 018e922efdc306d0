"""Who reads which documents, and in what order.

Everything here follows from the documents' numbers by a fixed mixing function, not a random number
generator of a library: sites with different versions of numpy must agree on who holds what, and a
run that is resumed after an upgrade must find its place.
"""

import math
from typing import Literal

import numpy as np

Split = Literal["auto", "all", "train", "validation"]

_HOLDOUT_SALT = 0x5EED_0F_401D


def mix(numbers: np.ndarray, *salts: int) -> np.ndarray:
    """A well mixed 64-bit number for each number: the finalizer of SplitMix64, once per salt.

    Args:
        numbers: ``[n]``, any integer dtype.
        salts: What else the result depends on.

    Returns:
        ``[n]`` uint64.
    """
    mixed = numbers.astype(np.uint64)
    for salt in salts:
        mixed = mixed + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFF_FFFF_FFFF_FFFF)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def split_documents(count: int, split: Split, holdout_fraction: float) -> np.ndarray:
    """Numbers of the documents in a split, ascending, int64.

    Without a hold-out every split has all of them: it was chosen by the names of files. The held-out
    documents depend on the count alone, not on a seed: whatever else two configs differ in, the one's
    training data is never the other's validation data.
    """
    everything = np.arange(count, dtype=np.int64)
    if split in ("auto", "all") or holdout_fraction == 0.0:
        return everything
    held = math.ceil(count * holdout_fraction)
    shuffled = np.argsort(mix(everything, _HOLDOUT_SALT), kind="stable")
    return np.sort(shuffled[:held] if split == "validation" else shuffled[held:])


def held_out(files: np.ndarray, places: np.ndarray, holdout_fraction: float) -> np.ndarray:
    """Which documents are held out where nobody knows how many there are, bool ``[n]``: about that fraction.

    As in ``split_documents``, no seed counts.

    Args:
        files: ``[n]`` uint64, by which the file of each is known.
        places: ``[n]`` int64, where each stands in its file.
        holdout_fraction: from 0 to below 1.
    """
    return mix(files ^ mix(places), _HOLDOUT_SALT) < np.uint64(holdout_fraction * 2**64)


def share(documents: np.ndarray, index: int, count: int) -> np.ndarray:
    """Part ``index`` of ``count``: every ``count``-th document, so parts differ by at most one."""
    return documents[index::count]


def epoch_order(documents: np.ndarray, units: np.ndarray | None, seed: int, epoch: int, window: int) -> np.ndarray:
    """The documents in the order of an epoch.

    Without units, a permutation of them all. With units (row groups, say, which cost the same to
    read whole or in part) the units are permuted, and then the documents within windows of whole
    units that start less than ``window`` documents apart.

    Args:
        documents: ``[n]`` int64 numbers.
        units: ``[n]``, the unit of each, or None.
        seed: Seed of the run.
        epoch: Pass over the corpus, from 0.
        window: Documents.

    Returns:
        ``[n]`` int64.
    """
    keys = mix(documents, seed, epoch)
    if units is None:
        return documents[np.argsort(keys, kind="stable")]
    by_unit = np.lexsort((keys, units, mix(units, seed, epoch, 1)))
    ordered = units[by_unit]
    starts_unit = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start_of_unit = np.maximum.accumulate(np.where(starts_unit, np.arange(len(ordered)), 0))
    return documents[by_unit][np.lexsort((keys[by_unit], start_of_unit // window))]
