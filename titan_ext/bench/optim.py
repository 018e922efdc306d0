"""Step time and state of each inner optimizer, against torch's AdamW(foreach=True).

All work on the same parameters, in the shapes of a Llama of 12 layers, with fixed random gradients, so
that nothing but the optimizers is measured: no model, no exchange. An optimizer and AdamW take turns;
neighbouring turns saw the same machine, so read their ratio rather than the milliseconds. The table has

  ms/step   the median of the optimizer's own turns;
  x AdamW   the median ratio of neighbouring turns: 0.5 is half of AdamW's time;
  state     bytes that the optimizer keeps for each parameter after its first steps, as measured.

Every optimizer runs at its defaults, with weight decay. "AdamW, fused" is what torchtitan trains with by
default. Muon's time is that of its matrix products, which a GPU does far better than a CPU. A step's
share of training is what matters in the end: compare with the seconds of a step of yours.
"""

import argparse
import inspect
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from titan_ext.errors import UserError

if TYPE_CHECKING:
    import torch

HELP = "step time and state of the inner optimizers, against torch's AdamW(foreach=True)"

_EXAMPLES = """\
examples:
  titan-ext bench optim                                        all, on the CPU and on the accelerator if there is one
  titan-ext bench optim --optimizers ADOPT,Muon --device cuda  two of them, on the GPU only
  titan-ext bench optim --state-dtype bfloat16                 with half-width moments, where an optimizer has them
  titan-ext bench optim --parameters 1e9 --seconds 10          the size of a real rank's share, and steadier figures
"""

_REFERENCE, _FUSED = "AdamW", "AdamW, fused"
_STATE_DTYPES = ("bfloat16", "float32", "float64")
# Pairs of turns at least, unless they take this many times the seconds that were given.
_FEWEST_PAIRS, _PATIENCE = 3, 4
# Seconds that a turn of the reference lasts at least, so that a clock and a launch do not count.
_TURN = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, where and for how long."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--parameters", type=float, default=2e7, help="parameters, roughly (default: 2e7)")
    parser.add_argument("--optimizers", help="names as in [optimizer] name, comma-separated (default: all of ours)")
    parser.add_argument("--device", help='"cpu" or the accelerator, such as "cuda" (default: both)')
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each optimizer and device (default: 3)")
    parser.add_argument("--state-dtype", choices=_STATE_DTYPES, help="dtype of the moments (default: the parameters')")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return its rows.

    Raises:
        UserError: an option is out of range.
    """
    builders, devices = _checked(options)
    rows, counted = [], 0
    for device in devices:
        parameters = _named_parameters(options.parameters, device)
        counted = sum(each.numel() for each in parameters.values())
        print(f"{_described_device(device)}, {counted:,} parameters in fp32")
        print(_line("optimizer", "ms/step", "x AdamW", "state", "turns"))
        rows += _measure(parameters, device, builders, options.seconds)
    print("x AdamW: median ratio of neighbouring turns; state: bytes a parameter, AdamW's in fp32 being 8")
    return {"parameters": counted, "rows": rows}


class _Turns:
    """One optimizer's steps, timed."""

    def __init__(self, optimizer: "torch.optim.Optimizer", device: "torch.device") -> None:
        self.optimizer = optimizer
        self.steps = 1
        self._device = device
        # The first step creates the state, ADOPT's second is the first that moves; then the clock is right.
        self.take(), self.take()

    def take(self) -> float:
        """Seconds a step."""
        self._wait()
        started = time.perf_counter()
        for _ in range(self.steps):
            self.optimizer.step()
        self._wait()
        return (time.perf_counter() - started) / self.steps

    def state_bytes(self) -> int:
        """Bytes of all tensors that the optimizer keeps."""
        import torch

        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(each.numel() * each.element_size() for each in values if isinstance(each, torch.Tensor))

    def _wait(self) -> None:
        import torch

        if self._device.type != "cpu":
            torch.accelerator.synchronize()


def _measure(
    parameters: dict[str, "torch.nn.Parameter"],
    device: "torch.device",
    builders: dict[str, Callable],
    seconds: float,
) -> list[dict[str, Any]]:
    """A row for the reference, then one for each of the others, printed as they come."""
    import torch

    group = {"params": [*parameters.values()], "param_names": [*parameters]}
    common: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
    reference = _Turns(torch.optim.AdamW([dict(group)], foreach=True, **common), device)
    reference.steps = max(1, math.ceil(_TURN / reference.take()))
    count = sum(each.numel() for each in parameters.values())
    theirs, rows = [], []
    for name, build in builders.items():
        measured = _Turns(build([dict(group)], **common), device)
        measured.steps = reference.steps
        pairs = _take_turns(reference, measured, seconds)
        theirs += [pair[0] for pair in pairs]
        ratio = median(ours / other for other, ours in pairs)
        own = median(pair[1] for pair in pairs)
        rows.append(_row(name, device, own, ratio, measured.state_bytes() / count, len(pairs)))
        print(_described(rows[-1]), flush=True)
    rows.insert(0, _row(_REFERENCE, device, median(theirs), 1.0, reference.state_bytes() / count, len(theirs)))
    print(_described(rows[0]), flush=True)
    return rows


def _take_turns(reference: _Turns, measured: _Turns, seconds: float) -> list[tuple[float, float]]:
    """Seconds a step of the reference and of the other, pair after pair until the time is up."""
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    while not pairs or time.perf_counter() < started + seconds * (_PATIENCE if len(pairs) < _FEWEST_PAIRS else 1):
        # Who goes first changes, so that neither always finds the caches of the other.
        if len(pairs) % 2:
            ours = measured.take()
            pairs.append((reference.take(), ours))
        else:
            other = reference.take()
            pairs.append((other, measured.take()))
    return pairs


def _named_parameters(size: float, device: "torch.device") -> dict[str, "torch.nn.Parameter"]:
    """Parameters by name, each with a gradient; the names tell Muon what is an embedding."""
    import torch

    from titan_ext.bench.sync_sites import SyntheticModel

    weights = list(SyntheticModel(size).to(device).weights)
    generator = torch.Generator(device).manual_seed(0)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator, device=device)
    names = ["tok_embeddings", *(f"layers.{place}" for place in range(len(weights) - 2)), "output"]
    return dict(zip(names, weights, strict=True))


def _checked(options: argparse.Namespace) -> tuple[dict[str, Callable], list["torch.device"]]:
    from titan_ext.config.settings import hint
    from titan_ext.trainer.optimizers import OptimizersContainer

    if not 1e4 <= options.parameters < math.inf:
        raise UserError(f"--parameters {options.parameters:g}: must be a number of at least 1e4")
    if not 0 < options.seconds < math.inf:
        raise UserError(f"--seconds {options.seconds:g}: must be a number above 0")
    known = OptimizersContainer.own_optimizers()
    names = list(known) if options.optimizers is None else options.optimizers.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--optimizers {name}: unknown optimizer; {hint(name, known)}")
    builders = {_FUSED: _fused()}
    for name in names:
        halved = options.state_dtype and "state_dtype" in inspect.signature(known[name]).parameters
        label = f"{name}, {options.state_dtype}" if halved else name
        builders[label] = partial(known[name], state_dtype=_dtype(options.state_dtype)) if halved else known[name]
    return builders, _devices(options.device)


def _fused() -> Callable:
    import torch

    return partial(torch.optim.AdamW, fused=True)


def _dtype(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, name)


def _devices(asked: str | None) -> list["torch.device"]:
    import torch

    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        found.append(torch.device(torch.accelerator.current_accelerator().type))
    chosen = [each for each in found if asked in (None, each.type)]
    if not chosen:
        raise UserError(f"--device {asked}: must be of {', '.join(each.type for each in found)} on this machine")
    return chosen


def _described_device(device: "torch.device") -> str:
    import torch

    from titan_ext.memory import processor_name

    if device.type == "cpu":
        return f"cpu: {processor_name()}, {torch.get_num_threads()} threads"
    return f"{device.type}: {torch.get_device_module(device).get_device_name()}"


def _row(name: str, device: "torch.device", seconds: float, ratio: float, state: float, turns: int) -> dict[str, Any]:
    return {
        "optimizer": name,
        "device": device.type,
        "seconds": round(seconds, 6),
        "ratio": round(ratio, 4),
        "state_bytes_per_parameter": round(state, 4),
        "turns": turns,
    }


def _described(row: dict[str, Any]) -> str:
    return _line(
        row["optimizer"],
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['ratio']:.3f}",
        f"{row['state_bytes_per_parameter']:.2f}",
        str(row["turns"]),
    )


def _line(name: str, *values: str) -> str:
    return f"{name:<20}" + "".join(f"{value:>10}" for value in values)
