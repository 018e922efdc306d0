"""Inner speed of a titan_ext site with no sync due, against plain torchtitan.

Both trainers live in one process, on the same model, data and settings, and take turns in blocks
of steps, so that whatever else the machine does slows both alike.
"""

import argparse
import os
import tempfile
import time
from dataclasses import fields
from statistics import median

HELP = "tokens per second of a site with no sync due, against plain torchtitan's"

SITE_CONFIG = """
[model]
name = "llama3"
flavor = "{flavor}"
[training]
seq_len = {seq_len}
local_batch_size = {batch}
steps = 1000000
[metrics]
enable_tensorboard = false
[semi_sync]
method = "diloco"
sync_every = {sync_every}
[[site]]
name = "bench"
data = "builtin:code"
tokenizer = "byte"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size and length of the measurement."""
    parser.add_argument("--flavor", default="debugmodel", help="flavor of the llama3 model (default: debugmodel)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--blocks", type=int, default=60, help="turns of each trainer (default: 60)")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (default: 2)")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Measure, print a table, and return tokens per second of both and their ratio."""
    single_rank_environment()
    import torch
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=1000)
    port = lighthouse.address().rsplit(":", 1)[1]
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = _build_trainers(options, folder, f"http://127.0.0.1:{port}")
        turns = {"torchtitan": _Turns(plain), "titan_ext": _Turns(ours)}
        for turn in turns.values():
            turn.take(3)
        rates: dict[str, list[float]] = {name: [] for name in turns}
        tokens = options.steps * options.batch * options.seq_len
        for block in range(options.blocks):
            # Who goes first changes, so that neither always finds the caches of the other.
            for name in sorted(turns, reverse=bool(block % 2)):
                rates[name].append(tokens / turns[name].take(options.steps))
        ours.close()
        plain.close()
    lighthouse.shutdown()
    torch.distributed.destroy_process_group()
    return _report(rates)


class _Turns:
    """One trainer's steps, timed."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self._batches = trainer.batch_generator(trainer.dataloader)
        trainer.should_continue_training()

    def take(self, steps: int) -> float:
        """Seconds that so many steps take."""
        started = time.perf_counter()
        for _ in range(steps):
            self._trainer.step += 1
            self._trainer.train_step(self._batches)
        return time.perf_counter() - started


def _build_trainers(options: argparse.Namespace, folder: str, lighthouse: str):
    from torchtitan.trainer import Trainer as PlainTrainer

    from titan_ext.config import load_site

    path = os.path.join(folder, "bench.toml")
    with open(path, "w", encoding="utf-8") as file:
        text = SITE_CONFIG.format(flavor=options.flavor, seq_len=options.seq_len, batch=options.batch, sync_every=10**6)
        file.write(text)
    configs = [
        load_site(path, "bench", [f"--dump_folder={folder}/{name}", f"--replica.lighthouse={lighthouse}"]).config
        for name in ("plain", "ours")
    ]
    # Everything but our own sections: the same classes, so that only the trainers differ.
    shared = {field.name: getattr(configs[0], field.name) for field in fields(PlainTrainer.Config)}
    return PlainTrainer.Config(**shared).build(), configs[1].build()


def single_rank_environment() -> None:
    """Make this process the one rank of a site, as torchrun would."""
    from torch.distributed import TCPStore

    global _store  # the manager's rendezvous; it must outlive this function
    _store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[name-defined]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_store.port),  # type: ignore[name-defined]
        # The port is served already; torch must not try to serve it again.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _report(rates: dict[str, list[float]]) -> dict[str, float]:
    # Neighbouring blocks saw the same machine, so their ratio is steadier than that of the totals.
    ratio = median(ours / plain for ours, plain in zip(rates["titan_ext"], rates["torchtitan"]))
    print(f"{'trainer':<12} {'tokens/s (median)':>18} {'min':>10} {'max':>10}")
    for name, values in rates.items():
        print(f"{name:<12} {median(values):>18,.0f} {min(values):>10,.0f} {max(values):>10,.0f}")
    print(f"titan_ext / torchtitan: {ratio:.4f} (median of the ratios of neighbouring turns)")
    return {
        "torchtitan_tokens_per_second": round(median(rates["torchtitan"]), 1),
        "titan_ext_tokens_per_second": round(median(rates["titan_ext"]), 1),
        "ratio": round(ratio, 4),
    }
