"""A site's program reduced to what the launcher sees of it: files, an exit code, processes, and manners.

    python stand_in.py FOLDER BEHAVIOUR

A process that stays writes its id to ``FOLDER/pids``, so that a test can see whether it is gone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    folder, behaviour = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "pids", "a") as file:
        file.write(f"{os.getpid()}\n")
    _BEHAVIOURS[behaviour](folder)


def train(folder: Path, digest: str = "a" * 64) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (1, 2, 3):
            line = {"kind": "step", "step": step, "loss": 5.0 - step, "tokens_per_second": 1234.5, "lr": 1e-3}
            file.write(json.dumps(line) + "\n")
        line = {"kind": "round", "round": 1, "step": 3, "participants": 2, "bytes_sent": 1_500_000}
        line |= {"bytes_received": 1_500_000, "seconds_quorum": 0.25, "seconds_reduce": 0.5, "seconds_apply": 0.25}
        file.write(json.dumps(line | {"committed": True}) + "\n")
    summary = {"final_loss": 2.0, "steps": 3, "tokens": 3000, "rounds": 1, "bytes_sent": 1_500_000}
    summary |= {"bytes_received": 1_500_000, "seconds": 1.5, "shared_state_sha256": digest}
    (folder / "summary.json").write_text(json.dumps(summary))


def train_otherwise(folder: Path) -> None:
    train(folder, digest="b" * 64)


def chatter(folder: Path) -> None:
    """Write to where nothing can be written, as torchft's threads do, which do not survive a failure; then train."""
    os.write(2, b"working\n" * 20_000)
    train(folder)


def die_once(folder: Path) -> None:
    """Die by a signal at the first attempt, train at the second."""
    if (folder / "died").exists():
        return train(folder)
    (folder / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def die(folder: Path) -> None:
    print("working")
    raise RuntimeError("the wheels came off")


def refuse(folder: Path) -> None:
    print("some chatter")
    print("titan-ext: error: training.steps = -1: must be at least 1", file=sys.stderr)
    print("more chatter")
    sys.exit(2)


def lose_a_rank(folder: Path) -> None:
    """As a site of two ranks: one fails, the other loses it and writes more, and later."""
    print("[rank1]: ZeroDivisionError: no warmth")
    print("titan-ext: error: rank 1: ZeroDivisionError: no warmth", file=sys.stderr)
    for line in range(30):
        print(f"[rank0]: line {line} of how the connection was lost")
    sys.exit(1)


def stay(folder: Path) -> None:
    (folder / "ready").touch()
    while True:
        time.sleep(60)


def ignore_sigterm(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stay(folder)


def leave(folder: Path) -> None:
    """As torchrun: tell the ranks, here one, which save and leave when they are told once."""
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    child = subprocess.Popen([sys.executable, __file__, str(folder / "rank"), "leave_alone"], start_new_session=True)
    while not (folder / "rank" / "ready").exists():
        time.sleep(0.02)
    (folder / "ready").touch()
    while not told:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    child.wait()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "left", "step": 7, "saved": True}) + "\n")
    sys.exit(128 + signal.SIGTERM)


def leave_alone(folder: Path) -> None:
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    (folder / "ready").touch()
    while not told:
        time.sleep(0.02)
    time.sleep(0.2)
    (folder / "told").write_text(str(len(told)))


def leave_once(folder: Path) -> None:
    """Leave by itself at the first attempt, train at the second."""
    if (folder / "left").exists():
        return train(folder)
    (folder / "left").touch()
    sys.exit(128 + signal.SIGTERM)


def have_children(folder: Path) -> None:
    """As torchrun: children in sessions of their own; here one that also ignores SIGTERM."""
    for behaviour in ("stay", "ignore_sigterm"):
        child = [sys.executable, __file__, str(folder / behaviour), behaviour]
        subprocess.Popen(child, start_new_session=True)
    while not all((folder / each / "ready").exists() for each in ("stay", "ignore_sigterm")):
        time.sleep(0.02)
    stay(folder)


def leave_children(folder: Path) -> None:
    """End well while a grandchild without a parent goes on."""
    child = [sys.executable, __file__, str(folder / "stay"), "stay"]
    subprocess.Popen(["sh", "-c", '"$@" &', "sh", *child], start_new_session=True)
    while not (folder / "stay" / "ready").exists():
        time.sleep(0.02)


_BEHAVIOURS = {
    each.__name__: each
    for each in (
        train, train_otherwise, chatter, die_once, die, lose_a_rank, refuse, stay, ignore_sigterm, have_children, leave_children,
        leave, leave_alone, leave_once,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
