"""The methods written from their equations, in float64 and plain loops."""

from collections.abc import Callable, Sequence

Vector = list[float]
InnerStep = Callable[[int, int, Vector], Vector]
"""(site, inner step from 1, parameters) -> parameters after the step."""


def mean(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    total = sum(weights)
    return [sum(w * v[i] for w, v in zip(weights, vectors)) / total for i in range(len(vectors[0]))]


def diloco(
    start: Vector,
    inner: InnerStep,
    *,
    sites: int,
    steps: int,
    period: int,
    lr: float,
    momentum: float,
    nesterov: bool,
    weights: Sequence[float] | None = None,
) -> list[Vector]:
    """Global parameters after each round (outer_loop.md 0.3): v = mu v + D; theta -= eta (D + mu v)."""
    weights = weights or [1.0] * sites
    theta, velocity = list(start), [0.0] * len(start)
    local = [list(start) for _ in range(sites)]
    history = []
    for step in range(1, steps + 1):
        local = [inner(site, step, local[site]) for site in range(sites)]
        if step % period:
            continue
        delta = mean([[t - x for t, x in zip(theta, each)] for each in local], weights)
        velocity = [momentum * v + d for v, d in zip(velocity, delta)]
        direction = [d + momentum * v for d, v in zip(delta, velocity)] if nesterov else velocity
        theta = [t - lr * d for t, d in zip(theta, direction)]
        local = [list(theta) for _ in range(sites)]
        history.append(list(theta))
    return history


def streaming_diloco(
    start: Vector,
    inner: InnerStep,
    *,
    fragments: Sequence[Sequence[int]],
    sites: int,
    steps: int,
    period: int,
    delay: int,
    alpha: float,
    lr: float,
    momentum: float,
) -> tuple[Vector, list[Vector]]:
    """Final global and local parameters (outer_loop.md 4.2): fragment p lands at (p+1) period / P."""
    theta, velocity = list(start), [0.0] * len(start)
    local = [list(start) for _ in range(sites)]
    flying: dict[int, Vector] = {}
    spacing = period // len(fragments)
    for step in range(1, steps + 1):
        local = [inner(site, step, local[site]) for site in range(sites)]
        for p, fragment in enumerate(fragments):
            offset = (p + 1) * spacing
            if (step + delay - offset) % period == 0 and step + delay >= offset:
                flying[p] = [sum(theta[i] - x[i] for x in local) / sites for i in fragment]
            if (step - offset) % period == 0 and p in flying:
                for i, delta in zip(fragment, flying.pop(p)):
                    velocity[i] = momentum * velocity[i] + delta
                    theta[i] -= lr * (delta + momentum * velocity[i])
                    for x in local:
                        x[i] = alpha * x[i] + (1 - alpha) * theta[i]
    return theta, local
