"""What `make faults` writes: a JSON report, and the table of docs/reliability.md."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.plain import PlainResult
from tests.faults.rounds import Round
from tests.faults.stand import ANSWER_TIMEOUT_S

BEGIN, END = "<!-- faults: written by make faults -->", "<!-- faults: end -->"
COUNTS = (
    "trials",
    "tasks",
    "lost",
    "published_twice",
    "within_bound",
    "wrong",
    "unheard",
    "streams",
    "stream_restarts",
    "webhooks",
    "webhooks_lost",
    "webhook_repeats",
    "left_behind",
    "burned",
    "re_executed",
)


def summary(rounds: Iterable[Round]) -> dict[str, Any]:
    """Counts of rounds together."""
    rounds = list(rounds)
    figures: dict[str, Any] = {name: sum(getattr(one, name) for one in rounds) for name in COUNTS}
    figures |= _spread("recovery", [seconds for one in rounds for seconds in one.recovery_s])
    for name in sorted({name for one in rounds for name in one.times}):
        figures |= _spread(name.removesuffix("_s"), [seconds for one in rounds for seconds in one.times.get(name, ())])
    figures["held"] = sum(sum(one.held) for one in rounds)
    figures["met_nobody"] = sum(one.met_nobody for one in rounds)
    figures["dead_lettered"] = dict(sum((one.dead_lettered for one in rounds), Counter()))
    figures["refused"] = dict(sum((one.refused for one in rounds), Counter()))
    figures["failures"] = [failure for one in rounds for failure in one.failures]
    figures["seconds"] = round(sum(one.seconds for one in rounds))
    return figures


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{name}_p50_s": None, f"{name}_max_s": None}
    return {f"{name}_p50_s": round(statistics.median(seconds), 2), f"{name}_max_s": round(max(seconds), 2)}


def report(rounds: Sequence[Round], plain: PlainResult | None, **more: Any) -> dict[str, Any]:
    """The whole report."""
    faults = list(dict.fromkeys(one.fault for one in rounds))
    found = summary(rounds)
    found["by_fault"] = {fault: summary(one for one in rounds if one.fault == fault) for fault in faults}
    if plain is not None:
        found["plain_celery"] = vars(plain) | _spread("recovery", plain.recovery_s)
    return found | {"machine": f"{os.cpu_count()} shared cores"} | more


def save(rounds: Sequence[Round], plain: PlainResult | None, path: Path) -> None:
    """Write the rounds themselves, to go on from."""
    write({"rounds": [vars(one) for one in rounds], "plain": vars(plain) if plain else None}, path)


def load(path: Path) -> tuple[list[Round], PlainResult | None]:
    """Read what was saved."""
    saved = json.loads(path.read_text())
    return [Round(**one) for one in saved["rounds"]], PlainResult(**saved["plain"]) if saved["plain"] else None


def write(found: dict[str, Any], path: Path) -> None:
    """Write the report; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(found, indent=2) + "\n")
    draft.replace(path)


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{found['began_at'][:10]}, {found['machine']}, {found['seconds'] / 60:.0f} minutes under load, "
        + ("as planned." if found["complete"] else "ended before all that was planned."),
        "",
        "| fault | trials | tasks | lost | published twice | re-executed | recovery p50 s | recovery max s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {**found["by_fault"], "**all**": found}
    for name, row in rows.items():
        cells = [name, *(f"{row[count]:,}" for count in ("trials", "tasks", "lost", "published_twice", "re_executed"))]
        lines.append(_row([*cells, _seconds(row["recovery_p50_s"]), _seconds(row["recovery_max_s"])]))
    plain = found.get("plain_celery")
    if plain is not None:
        cells = ["plain Celery: worker-kill", *(f"{plain[name]:,}" for name in ("trials", "tasks", "lost"))]
        cells += ["-", f"{plain['delivered_again']:,} delivered again"]
        lines.append(_row([*cells, _seconds(plain["recovery_p50_s"]), _seconds(plain["recovery_max_s"])]))
    lines += ["", _lost_workers(found) + _remarks(found)]
    if plain is not None:
        lines += [
            "",
            f"Plain Celery's visibility timeout is {plain['visibility_timeout_s']} s here, one hour by default. "
            f"{plain['took_nothing']} times one of its workers ran and took nothing for {ANSWER_TIMEOUT_S:.0f} s "
            "beside a backlog, and was killed without a trial.",
        ]
    return "\n".join(lines)


def _remarks(found: dict[str, Any]) -> str:
    said = [
        f"Of the lost and the published twice, {found['within_bound']} were of the last two seconds before Valkey was "
        "killed in the mode `everysec`, which does not promise them.",
        f"Wrong results {found['wrong']}, ends of which the client was not told {found['unheard']}, messages left "
        f"behind {found['left_behind']}, attempts counted while a server was away {found['burned']}, trials that did "
        f"not recover {len(found['failures'])}.",
    ]
    said.append(
        f"Streams that were read to a true end meanwhile: {found['streams']}; their readers were told "
        f"{found['stream_restarts']} times that outputs begin anew."
    )
    said.append(
        f"Tasks whose webhook arrived meanwhile, at a receiver that was away at times: {found['webhooks']}. "
        f"Lost: {found['webhooks_lost']}. Arrived again, under the same id: {found['webhook_repeats']}."
    )
    letters = ", ".join(f"{name} {count}" for name, count in found["dead_lettered"].items())
    said.append(f"Dead letters: {letters or 'none'}.")
    refused = ", ".join(f"{name} {count:,}" for name, count in found["refused"].items())
    said.append(f"Submits that raised, so that the client knew: {refused or 'none'}.")
    return " ".join(said)


def _lost_workers(found: dict[str, Any]) -> str:
    kill = found["by_fault"].get("worker-kill")
    if kill is None:
        return ""
    return (
        f"A killed worker's tasks were back in their queues after {kill['returned_p50_s']:.2f} s (p50; max "
        f"{kill['returned_max_s']:.2f} s), and all started elsewhere after {kill['running_p50_s']:.2f} s (max "
        f"{kill['running_max_s']:.2f} s). "
    )


def memory_table(found: dict[str, Any]) -> str:
    """The memory of a soak."""
    lines = ["| memory | after warm-up MB | at the end MB | growth |", "|---|---|---|---|"]
    for name, row in found["memory"].items():
        lines.append(_row([name, f"{row['begin_mb']:.1f}", f"{row['end_mb']:.1f}", f"{row['growth']:+.1%}"]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def publish(text: str, page: Path, begin: str = BEGIN, end: str = END) -> None:
    """Put the table in its place on the page."""
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"{page} has no place for the table: expected {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
