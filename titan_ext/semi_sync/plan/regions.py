"""The tree of sites: a site's region is a path such as ``eu/de``, and regions of one parent are close to each other."""

MOST_LEVELS = 3
"""Names in a region's path."""

REGION = "region"
"""Key of the label that is a site's whole path."""

LEVELS = tuple(f"{REGION}/{level}" for level in range(MOST_LEVELS, 0, -1))
"""Keys of the labels that are the first names of the path, the deepest first."""


def names_in_common(path: str, other: str) -> int:
    """How many names two regions' paths begin with alike: the more, the nearer they are; 0 where one is empty."""
    count = 0
    for own, theirs in zip(path.split("/"), other.split("/"), strict=False):
        if not own or own != theirs:
            break
        count += 1
    return count


def level_labels(path: str) -> dict[str, str]:
    """The labels of ``LEVELS`` for a site of this region: the first names of its path, all of it where it has no more."""
    names = path.split("/")
    return {f"{REGION}/{level}": "/".join(names[:level]) for level in range(1, MOST_LEVELS + 1)}
