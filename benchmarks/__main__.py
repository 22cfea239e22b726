"""`make bench`: both sides of every claim in one run, a table, a plot and `benchmarks/results/latest.json`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.measure import READ_TIMEOUT_S, READS
from benchmarks.parts import PARTS, RATIOS, measured, parts_of, run
from benchmarks.spread import Spread, spread

RESULTS = Path(__file__).parent / "results"
QUICK_SCALE = 0.05
Found = dict[str, float | None]


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Requests a second, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {
        "Celery prefork": figures["celery_prefork_per_s"],
        "Celery threads": figures["celery_threads_per_s"],
        "straight client": figures["direct_per_s"],
        "Samphire end to end": figures["end_to_end_per_s"],
        "Samphire drain, always": figures["drain_per_s_always"],
        "Samphire drain": figures["drain_per_s"],
    }
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    axes.bar_label(axes.barh(list(bars), list(bars.values())), fmt="{:,.0f}", padding=3)
    axes.set_xlabel(f"requests/s through Triton, FP32 [1,16], {os.cpu_count()} shared cores")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def show(name: str, value: float) -> None:
    """A figure, as soon as it is known."""
    print(f"  {name:<34} {value:>12,.2f}", flush=True)


def print_ratios(found: Found) -> None:
    """The table of a run."""
    print(f"\n{'ratio':<30}{'reached':>14}{'to reach':>14}")
    for name, ratio in RATIOS.items():
        if name not in found:
            continue
        value = found[name]
        wanted = "" if ratio.target is None else f"{ratio.sign} {ratio.target:g}"
        shown = "-" if value is None else f"{value:,.2f}"
        print(f"{name:<30}{shown:>14}{wanted:>14}{'' if ratio.met(value) else '   not reached'}")


def print_spreads(spreads: Mapping[str, Spread], runs: int) -> None:
    """The table of several runs."""
    print(f"\n{f'of {runs} runs':<36}{'median':>14}{'least':>14}{'most':>14}  95 % interval of the median")
    for name, one in spreads.items():
        interval = "" if one.low is None or one.high is None else f"{one.low:,.2f} to {one.high:,.2f}"
        print(f"{name:<36}{one.median:>14,.2f}{one.least:>14,.2f}{one.most:>14,.2f}  {interval}")


def repeat(parts: Sequence[str], options: argparse.Namespace) -> list[Found]:
    """Measure these parts as often as asked for."""
    own = {"read-one-by-one": {"reads": options.reads, "timeout_s": options.read_timeout_s}}
    found = []
    for number in range(options.runs):
        if options.runs > 1:
            print(f"run {number + 1} of {options.runs}", flush=True)
        found.append(measured(run(parts, options.scale, show, own), parts))
    return found


def spreads_of(runs: Sequence[Found]) -> dict[str, Spread]:
    """Of each figure that every run has reached."""
    reached = {name for name in runs[0] if all(one.get(name) is not None for one in runs)}
    return {name: spread([one[name] for one in runs]) for name in runs[0] if name in reached}  # type: ignore[misc]


def single(options: argparse.Namespace) -> None:
    """This version alone."""
    began = time.time()
    parts = parts_of(options.only)
    runs = repeat(parts, options)
    spreads = spreads_of(runs)
    found = {name: spreads[name].median if name in spreads else None for name in runs[0]}
    report = {
        "ratios": found,
        "spread": {name: vars(one) for name, one in spreads.items()} if len(runs) > 1 else {},
        "runs": len(runs),
        "scale": options.scale,
        "machine": f"{os.cpu_count()} shared cores",
        "python": platform.python_version(),
        "seconds": round(time.time() - began),
    }
    if len(runs) > 1:
        print_spreads(spreads, len(runs))
    print_ratios(found)
    name = "latest" if not options.only else "-".join(options.only)
    write(report, options.results / f"{name}.json")
    if options.only:
        print(json.dumps(report))
    else:
        plot(found, options.results / "latest.png")


def compared(options: argparse.Namespace) -> None:
    """This version and another by turns."""
    parts = options.only or turns.PARTS
    with turns.checkout(options.base) as base:
        found = turns.take_turns(
            base,
            turns.ROOT,
            options.pairs,
            lambda version: turns.measure(version, parts, options.scale),
            lambda line: print(line, flush=True),
        )
    comparisons = turns.compare(found)
    print(f"\n{turns.table(comparisons, options.base, options.pairs)}")
    write(turns.report(comparisons, found, options.base), options.results / "turns.json")


def write(report: Mapping[str, Any], path: Path) -> None:
    """Keep a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {path}")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work: it runs, however fast")
    parser.add_argument("--scale", type=float, help="share of the work; 1 by default, with --base a fifth")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the reports")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", choices=[*PARTS, *RATIOS], help="measure this alone"
    )
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="so many times: medians and ranges")
    parser.add_argument("--base", metavar="COMMIT", help="by turns with the version of this commit")
    parser.add_argument("--pairs", type=int, default=turns.PAIRS, metavar="N", help="turns with --base")
    parser.add_argument("--reads", type=int, default=READS, metavar="N", help="results of read-one-by-one")
    parser.add_argument("--read-timeout-s", type=float, default=READ_TIMEOUT_S, help="for all of them together")
    options = parser.parse_args()
    if options.scale is None:
        options.scale = QUICK_SCALE if options.quick else turns.SCALE if options.base else 1.0
    if options.base:
        compared(options)
    else:
        single(options)


if __name__ == "__main__":
    main()
