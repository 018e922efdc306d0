"""Tables of the wide-area benchmark."""

from statistics import median
from typing import Any

PLAIN, OURS, EMPTY = "plain TCP, {} stream(s)", "ours, {}", "{}, empty"
OVERLAP, STATE = "overlap", "state"
"""Names of rows."""


def report_transfer(rounds: dict[str, list[dict[str, float]]], rtt: float) -> list[dict[str, Any]]:
    """Print what rounds over one link came to; returns a row for each way of sending.

    Args:
        rounds: by the way's name the figures of each round.
        rtt: milliseconds there and back.
    """

    def seconds(name: str) -> float:
        return median(each["seconds"] for each in rounds[name])

    fp32 = OURS.format("fp32")
    plain = min((name for name in rounds if name.startswith("plain")), key=seconds)
    torchft = next(name for name in rounds if name.startswith("torchft"))
    references = {"plain_tcp": plain, "torchft": torchft, "fp32": fp32}
    print(f"{'a round':<26}{'seconds':>9}{'MB':>8}" + "".join(f"{f'x {key}':>14}" for key in references))
    rows: list[dict[str, Any]] = []
    for name in (each for each in rounds if "empty" not in each):
        ratios = {f"x_{key}": round(seconds(name) / seconds(other), 3) for key, other in references.items()}
        megabytes = median(each["bytes"] for each in rounds[name]) / 1e6
        print(
            f"{name:<26}{seconds(name):>9.3f}{megabytes:>8.1f}" + "".join(f"{each:>14.2f}" for each in ratios.values())
        )
        rows.append({"name": name, "seconds": round(seconds(name), 4), "megabytes": round(megabytes, 2), **ratios})
    for name in rounds:
        if name.startswith("ours"):
            parts = {key: median(each[key] for each in rounds[name]) for key in ("quorum", "reduce", "apply")}
            print(
                f"  {name}: quorum {parts['quorum']:.3f}, reduction {parts['reduce']:.3f}, apply {parts['apply']:.3f} s"
            )
    print("  x plain_tcp: over as many connections as were fastest")
    for name in (each for each in rounds if "empty" in each):
        trips = {"round_trips": round(seconds(name) * 1000 / rtt, 2)} if rtt else {}
        print(
            f"control:  {name}: {seconds(name):.3f} s" + "".join(f", {each:.1f} round trips" for each in trips.values())
        )
        rows.append({"name": name, "seconds": round(seconds(name), 4), **trips})
    difference = median(each["sent"] / each["frames"] - 1 for each in rounds[fp32])
    print(f"ledger:   the link carried {difference:+.2%} of the ledger's bytes of frames in a round of {fp32}")
    next(row for row in rows if row["name"] == fp32)["ledger_difference"] = round(difference, 4)
    return rows


def report_state(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print how long a joining site's state took, and plain TCP; returns its row."""
    medians = {name: median(each) for name, each in seconds.items()}
    taken = medians.pop(STATE)
    plain = min(medians, key=lambda name: medians[name])
    print(f"state:    {taken:.3f} s, {plain}: {medians[plain]:.3f} s: x {taken / medians[plain]:.2f}")
    return {"name": STATE, "seconds": round(taken, 4), "x_plain_tcp": round(taken / medians[plain], 3)}


def report_overlap(blocks: list[dict[str, float]]) -> dict[str, Any]:
    """Print what the trainers' turns came to; returns their row."""
    first = blocks[0]
    ratio = median(each["silent"] / each["streaming"] for each in blocks)
    rates = {name: median(each["tokens"] / each[name] for each in blocks) for name in ("silent", "streaming")}
    exchange = median(each["exchange"] for each in blocks)
    hidden = first["delay"] * median(each["silent"] for each in blocks) / first["steps"]
    difference = sum(each["sent"] for each in blocks) / sum(each["bytes"] for each in blocks) - 1
    print(
        f"overlap: {rates['silent']:,.0f} tokens/s without communication, {rates['streaming']:,.0f} with: {ratio:.1%}"
    )
    fits = "fits" if exchange < hidden else "does NOT fit"
    print(f"         an exchange of {exchange:.2f} s {fits} into the {hidden:.2f} s of {first['delay']:.0f} steps")
    print(f"ledger:  the interface sent {difference:+.2%} of the ledger's bytes while training")
    return {
        "name": OVERLAP,
        **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
        "tokens_kept": round(ratio, 4),
        "exchange_seconds": round(exchange, 4),
        "hidden_seconds": round(hidden, 4),
        "ledger_difference": round(difference, 4),
    }


def summary(rows: list[dict[str, Any]], codecs: list[str]) -> dict[str, Any]:
    """A link in one row: fp32 against plain TCP and torchft, codecs against fp32, round trips of an empty round."""
    by_name = {row["name"]: row for row in rows}
    first, empty = by_name[OURS.format("fp32")], by_name[EMPTY.format(OURS.format("fp32"))]
    return {
        **{key: first[key] for key in ("rate_mbit", "rtt", "seconds", "x_plain_tcp", "x_torchft")},
        **{f"{codec}_x_fp32": by_name[OURS.format(codec)]["x_fp32"] for codec in codecs[1:]},
        "empty_round_trips": empty.get("round_trips"),
        "state_x_plain_tcp": by_name[STATE]["x_plain_tcp"] if STATE in by_name else None,
        "tokens_kept": by_name[OVERLAP]["tokens_kept"] if OVERLAP in by_name else None,
        "ledger_difference": first["ledger_difference"],
    }


def print_links(links: list[dict[str, Any]]) -> None:
    """The rows of ``summary`` one below the other."""
    print(
        "\nfp32 over each link: seconds, against plain TCP and torchft; codecs against it; an empty round; tokens/s kept"
    )
    keys = [key for key in links[0] if any(link[key] is not None for link in links)]
    print("  ".join(keys))
    for link in links:
        print("  ".join(f"{'-' if link[key] is None else format(link[key], 'g'):>{len(key)}}" for key in keys))
