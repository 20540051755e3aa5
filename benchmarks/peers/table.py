"""The markdown of a result: each case, each peer."""

from __future__ import annotations

from .environments import PEERS
from .work import ABOUT, FULL, GOALS

HEADER = (
    "| case | peer | scheme | time over ours | goal | mass-steps/s | first call, s | from float64 |\n"
    "|---|---|---|---|---|---|---|---|"
)
NAMES = {"euler": "Euler", "exp_euler": "exponential Euler", "heun": "Heun"}


def markdown(numbers: dict) -> str:
    """The table, and below it what each case is, how each peer runs, its settings, and what was left out and why."""
    lines, why, settings = [HEADER], [], []
    for result in numbers["results"]:
        title = f"{result['case']}, {result['masses']:,} x {result['steps']:,}"
        for name, row in result["peers"].items():
            peer = _title(name, numbers)
            if "ratio" in row or "seconds" in row:
                lines.append(_line(title, peer, row, GOALS.get((result["case"], name))))
                if len(row["settings"]) > 1:
                    settings.append(f"- {result['case']}, {peer}: {row['setting']}{_on_one_device(row)}")
            else:
                why.append((peer, result["case"], row.get("refused") or row.get("skipped")))
    lines += ["", *(f"- {case}: {about}" for case, about in ABOUT.items() if _has(numbers, case))]
    lines += ["", *(f"- {_title(n, numbers)}: {a['how']}" for n, a in numbers["peers"].items() if "how" in a)]
    lines += ["", "Fastest settings:", "", *settings] if settings else []
    skipped = {(peer, reason): [c for p, c, r in why if (p, r) == (peer, reason)] for peer, _, reason in why}
    lines += ["", *(f"- not run: {peer} ({', '.join(cases)}): {reason}" for (peer, reason), cases in skipped.items())]
    return "\n".join(lines).rstrip() + "\n"


def _has(numbers: dict, case: str) -> bool:
    return any(result["case"] == case for result in numbers["results"])


def _title(name: str, numbers: dict) -> str:
    version = numbers["peers"].get(name, {}).get("versions", {}).get(name)
    return f"{PEERS[name].title} {version}" if version else PEERS[name].title


def _line(case: str, peer: str, row: dict, goal: float | None) -> str:
    ratio = f"{row['ratio']:.2f}x" if "ratio" in row else "-"
    aim = f"{goal:g}x" if goal else "-"
    rate = f"{row['mass_steps_per_s'] / 1e6:.0f} M"
    cells = [case, peer, NAMES[row["scheme"]], ratio, aim, rate, f"{row['first']:.2f}", _error(row)]
    return f"| {' | '.join(cells)} |"


def _error(row: dict) -> str:
    """Of records, the rms in mV from RK4; of slopes, the relative distances from the same scheme and from RK4."""
    if "rms_mV" in row:
        return f"{row['rms_mV']:.2g} mV"
    return f"{row['from_scheme']:.0e}; {row['slopes_from_rk4']:.2g} from RK4"


def _on_one_device(row: dict) -> str:
    """Where lanes are shared, how much longer the fastest setting without took when it was tried."""
    tried = {name: each for name, each in row["settings"].items() if not isinstance(each, str)}
    alone = [each for name, each in tried.items() if not name.endswith(" devices")]
    if not row["setting"].endswith(" devices") or not alone:
        return ""
    return f" (the fastest on one device took {min(alone) / tried[row['setting']]:.1f} times as long)"


def goals(numbers: dict) -> list[str]:
    """A line for each goal: met or missed."""
    lines = []
    for result in numbers["results"]:
        for (case, name), aim in GOALS.items():
            got = result["peers"].get(name, {}).get("ratio") if case == result["case"] else None
            if got is not None and FULL[case].masses == result["masses"]:
                said = "met" if got >= aim else "missed"
                lines.append(f"{case}: {got:.2f}x {PEERS[name].title}, goal {aim:g}x: {said}")
    return lines
