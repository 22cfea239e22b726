"""`make bench`: both sides of every claim in one run, a table, a plot and `benchmarks/results/latest.json`."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.stack import bench_stack

RESULTS = Path(__file__).parent / "results"

TARGETS = {
    "drain_vs_direct": (">=", 1.2),
    "drain_always_vs_direct": (">=", None),
    "drain_vs_celery": (">=", 25),
    "end_to_end_vs_celery": (">=", 15),
    "p50_over_direct_ms": ("<=", 1.2),
    "p99_over_direct_ms": ("<=", 5),
    "publish_vs_send_task": (">=", 12),
    "queued_bytes_over_payload": ("<=", 1536),
    "worker_memory_mb": ("<=", 300),
    "claim_cost_1m_vs_1k": ("<=", 1.2),
}


def run(quick: bool) -> dict[str, Any]:
    """Measure everything; figures by name."""
    scale = 0.05 if quick else 1.0
    figures: dict[str, Any] = {}

    def note(name: str, value: float) -> None:
        figures[name] = round(value, 4)
        print(f"  {name:<34} {value:>12,.2f}", flush=True)

    for fsync in ("everysec", "always"):
        print(f"appendfsync {fsync}", flush=True)
        with bench_stack(fsync) as stack:
            if fsync == "everysec":
                for name, value in measure.direct(stack, scale).items():
                    note(name, value)
                for name, value in measure.latency(stack, scale).items():
                    note(name, value)
                for name, value in measure.plain_celery(stack, scale).items():
                    note(name, value)
                for name, value in measure.large_tensors(stack, scale).items():
                    note(name, value)
            for name, value in measure.samphire(stack, scale).items():
                note(name if fsync == "everysec" else f"{name}_always", value)
            if fsync == "always":  # as the stack runs by default
                for name, value in measure.fairness(stack, scale).items():
                    note(name, value)
            if fsync == "everysec":
                for name, value in measure.claim_cost(stack, 1_000_000 if not quick else 20_000).items():
                    note(name, value)
    return figures


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """What the figures say beside each other."""
    celery = max(figures["celery_threads_per_s"], figures["celery_prefork_per_s"])
    celery_end_to_end = max(figures["celery_threads_end_to_end_per_s"], figures["celery_prefork_end_to_end_per_s"])
    direct = figures["direct_per_s"]
    found = {
        "drain_vs_direct": figures["drain_per_s"] / direct,
        "drain_always_vs_direct": figures["drain_per_s_always"] / direct,
        "drain_always_vs_everysec": figures["drain_per_s_always"] / figures["drain_per_s"],
        "drain_vs_celery": figures["drain_per_s"] / celery,
        "end_to_end_vs_celery": figures["end_to_end_per_s"] / celery_end_to_end,
        "p50_over_direct_ms": figures["samphire_p50_ms"] - figures["direct_p50_ms"],
        "p99_over_direct_ms": figures["samphire_p99_ms"] - figures["direct_p99_ms"],
        "publish_per_s": figures["publish_per_s"],
        "publish_vs_send_task": figures["publish_per_s"] / figures["send_task_per_s"],
        "queued_bytes_over_payload": figures["queued_bytes_over_payload"],
        "worker_memory_mb": figures["worker_memory_mb"],
        **fairness_ratios(figures),
        "claim_cost_1m_vs_1k": figures["claim_us_1m"] / figures["claim_us_1k"],
        "claim_cost_100k_vs_1k": figures["claim_us_100k"] / figures["claim_us_1k"],
    }
    return {name: round(value, 3) for name, value in found.items()}


def fairness_ratios(figures: dict[str, Any]) -> dict[str, float]:
    """What a neighbour's backlog costs a tenant's first task."""
    alone, beside = figures["first_task_alone_p50_ms"], figures["first_task_beside_backlog_p50_ms"]
    return {
        "first_task_beside_vs_alone": round(beside / alone, 3),
        "first_task_delay_p50_ms": round(beside - alone, 3),
        "first_task_delay_max_ms": round(figures["first_task_beside_backlog_max_ms"] - alone, 3),
    }


def only_fairness(quick: bool) -> None:
    """That part alone; nothing is written."""
    with bench_stack("always") as stack:
        figures = measure.fairness(stack, 0.05 if quick else 1.0)
    for name, value in (figures | fairness_ratios(figures)).items():
        print(f"  {name:<34} {value:>12,.2f}", flush=True)


def plot(figures: dict[str, Any], path: Path) -> None:
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
    axes.set_xlabel("requests/s through Triton, FP32 [1,16], 2 shared cores")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work: it runs, however fast")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for latest.json and latest.png")
    parser.add_argument("--only", choices=["fairness"], help="measure this part alone, and write nothing")
    arguments = parser.parse_args()
    if arguments.only:
        only_fairness(arguments.quick)
        return
    began = time.time()
    figures = run(arguments.quick)
    found = ratios(figures)
    print(f"\n{'ratio':<28}{'reached':>12}{'to reach':>14}")
    for name, value in found.items():
        sign, target = TARGETS.get(name, ("", None))
        wanted = "" if target is None else f"{sign} {target:g}"
        met = target is None or (value >= target if sign == ">=" else value <= target)
        print(f"{name:<28}{value:>12,.2f}{wanted:>14}{'' if met else '   not reached'}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    report = {
        "ratios": found,
        "figures": figures,
        "quick": arguments.quick,
        "machine": "2 shared cores",
        "python": platform.python_version(),
        "seconds": round(time.time() - began),
    }
    (arguments.results / "latest.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(figures, arguments.results / "latest.png")
    print(f"\nwritten: {arguments.results}/latest.json and latest.png, after {report['seconds']} s")


if __name__ == "__main__":
    main()
