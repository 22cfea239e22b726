"""The parts of the benchmark, and what their figures say beside each other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks import idle, measure, places, rivals, stall, streams
from benchmarks.stack import BenchStack, Figures, bench_stack

Note = Callable[[str, float], None]
Measure = Callable[[BenchStack, float], Figures]


@dataclass(frozen=True)
class Part:
    """Something that is measured on a stack of its own durability."""

    fsync: Literal["everysec", "always"]
    measure: Measure
    suffix: str = ""
    """Appended to the names of its figures."""


def _webhooks(name: Literal["outbox", "arrival"], stack: BenchStack, scale: float) -> Figures:
    from benchmarks import webhooks  # a version that is compared with may have none

    measure: Measure = getattr(webhooks, name)
    return measure(stack, scale)


PARTS: dict[str, Part] = {
    "direct": Part("everysec", rivals.direct),
    "latency": Part("everysec", measure.latency),
    "celery": Part("everysec", rivals.plain_celery),
    "large-tensors": Part("everysec", measure.large_tensors),
    "drain": Part("everysec", measure.drain),
    "claims": Part("everysec", measure.claim_cost),
    "read-one-by-one": Part("everysec", measure.read_one_by_one),
    "stream": Part("everysec", streams.stream),
    "streams": Part("everysec", streams.many_streams),
    "resume": Part("everysec", streams.resume),
    "stall": Part("everysec", stall.stall),
    "idle": Part("everysec", idle.idle),
    "place": Part("everysec", places.place),
    "drain-always": Part("always", measure.drain, "_always"),
    "fairness": Part("always", measure.fairness),  # as the stack runs by default
    "webhook": Part("always", functools.partial(_webhooks, "arrival")),
    "webhooks": Part("always", functools.partial(_webhooks, "outbox")),  # the endpoint that hangs leaves dead letters
}
"""In the order in which they run."""

Compute = Callable[[Figures], float | None]


@dataclass(frozen=True)
class Ratio:
    """A figure of the report, made of the figures of some parts."""

    parts: tuple[str, ...]
    compute: Compute
    sign: Literal[">=", "<=", ""] = ""
    target: float | None = None

    def met(self, value: float | None) -> bool:
        """Whether it is where it is to be."""
        if value is None:
            return False
        if self.target is None:
            return True
        return value >= self.target if self.sign == ">=" else value <= self.target


def figure(name: str) -> Compute:
    """A figure itself; None where it was not reached."""
    return lambda figures: figures.get(name)


def over(above: str, *below: str) -> Compute:
    """A figure, times the best of others."""
    return lambda figures: figures[above] / max(figures[name] for name in below)


def beyond(more: str, less: str) -> Compute:
    """By how much a figure is more than another."""
    return lambda figures: figures[more] - figures[less]


CELERY = ("celery_threads_per_s", "celery_prefork_per_s")
CELERY_END_TO_END = ("celery_threads_end_to_end_per_s", "celery_prefork_end_to_end_per_s")
ALONE, BESIDE = "first_task_alone_p50_ms", "first_task_beside_backlog_p50_ms"

RATIOS: dict[str, Ratio] = {
    "drain_per_s": Ratio(("drain",), figure("drain_per_s")),
    "drain_vs_direct": Ratio(("drain", "direct"), over("drain_per_s", "direct_per_s"), ">=", 1.2),
    "drain_always_vs_direct": Ratio(("drain-always", "direct"), over("drain_per_s_always", "direct_per_s")),
    "drain_always_vs_everysec": Ratio(("drain-always", "drain"), over("drain_per_s_always", "drain_per_s")),
    "drain_vs_celery": Ratio(("drain", "celery"), over("drain_per_s", *CELERY), ">=", 25),
    "end_to_end_per_s": Ratio(("drain",), figure("end_to_end_per_s")),
    "end_to_end_vs_celery": Ratio(("drain", "celery"), over("end_to_end_per_s", *CELERY_END_TO_END), ">=", 15),
    "p50_over_direct_ms": Ratio(("latency",), beyond("samphire_p50_ms", "direct_p50_ms"), "<=", 1.2),
    "p99_over_direct_ms": Ratio(("latency",), beyond("samphire_p99_ms", "direct_p99_ms"), "<=", 5),
    "publish_per_s": Ratio(("drain",), figure("publish_per_s")),
    "publish_vs_send_task": Ratio(("drain", "celery"), over("publish_per_s", "send_task_per_s"), ">=", 12),
    "queued_bytes_over_payload": Ratio(("drain",), figure("queued_bytes_over_payload"), "<=", 1536),
    "worker_memory_mb": Ratio(("drain",), figure("worker_memory_mb"), "<=", 300),
    "first_task_beside_vs_alone": Ratio(("fairness",), over(BESIDE, ALONE)),
    "first_task_delay_p50_ms": Ratio(("fairness",), beyond(BESIDE, ALONE)),
    "first_task_delay_max_ms": Ratio(("fairness",), beyond("first_task_beside_backlog_max_ms", ALONE)),
    "claim_cost_1m_vs_1k": Ratio(("claims",), over("claim_us_1m", "claim_us_1k"), "<=", 1.2),
    "claim_cost_100k_vs_1k": Ratio(("claims",), over("claim_us_100k", "claim_us_1k")),
    "stall_claim_vs_push": Ratio(("stall",), over("stall_claim_ms", "stall_push_ms"), "<=", 3),
    "place_p95_ms": Ratio(("place",), figure("place_p95_ms"), "<=", 20),
    "place_slowest_command_ms": Ratio(("place",), figure("place_slowest_command_ms"), "<=", 5),
    "idle_share": Ratio(("idle",), figure("idle_share"), "<=", 0.05),
    "first_output_over_direct_ms": Ratio(
        ("stream",), beyond("samphire_first_output_p50_ms", "direct_first_output_p50_ms"), "<=", 3
    ),
    "stream_vs_direct": Ratio(("stream",), over("samphire_stream_per_s", "direct_stream_per_s"), ">=", 0.5),
    "streams_200_lag_p99_ms": Ratio(("streams",), figure("streams_200_lag_p99_ms"), "<=", 100),
    "streams_200_slowest_per_s": Ratio(("streams",), figure("streams_200_slowest_per_s"), ">=", 9.9),
    "resume_p50_ms": Ratio(("resume",), figure("resume_p50_ms"), "<=", 100),
    "webhooks_per_s": Ratio(("webhooks",), figure("webhooks_per_s"), ">=", 1000),
    "webhook_p50_ms": Ratio(("webhook",), figure("webhook_p50_ms"), "<=", 20),
    "webhook_p99_ms": Ratio(("webhook",), figure("webhook_p99_ms"), "<=", 250),
    "read_one_by_one_p50_ms": Ratio(("read-one-by-one",), figure("read_one_by_one_p50_ms")),
    "read_one_by_one_round_trips": Ratio(("read-one-by-one",), figure("read_one_by_one_round_trips")),
}


def parts_of(names: Sequence[str]) -> list[str]:
    """The parts that these parts and figures need, in their order; all, where none is named."""
    wanted = {part for name in names for part in (RATIOS[name].parts if name in RATIOS else (name,))}
    return [part for part in PARTS if not names or part in wanted]


def measured(figures: Figures, parts: Collection[str]) -> dict[str, float | None]:
    """All figures, and those that these parts make beside each other; None for what was not reached."""
    made = {name: ratio.compute(figures) for name, ratio in RATIOS.items() if set(ratio.parts) <= set(parts)}
    found: dict[str, float | None] = {**figures, **made}
    return {name: None if value is None else round(float(value), 4) for name, value in found.items()}


def run(
    parts: Sequence[str],
    scale: float,
    note: Note,
    options: Mapping[str, Mapping[str, float]],
    skip: Callable[[str, Exception], bool] = lambda _part, _error: False,
) -> Figures:
    """Measure some parts, those of the same durability on one stack.

    Args:
        parts: their names.
        scale: share of the whole work.
        note: is told of each figure as soon as it is known.
        options: of single parts.
        skip: whether to go on without a part that has raised this error.
    """
    figures = Figures()
    for fsync in ("everysec", "always"):
        chosen = {name: PARTS[name] for name in parts if PARTS[name].fsync == fsync}
        if not chosen:
            continue
        with bench_stack(fsync) as stack:
            for name, part in chosen.items():
                try:
                    found = functools.partial(part.measure, **options.get(name, {}))(stack, scale)
                except Exception as error:
                    if skip(name, error):
                        continue
                    raise
                for figure_name, value in found.items():
                    figures[figure_name + part.suffix] = value
                    note(figure_name + part.suffix, value)
    return figures
