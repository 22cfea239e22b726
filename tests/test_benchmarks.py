"""The benchmarks: they run, they look at every answer, and their statistics are right. How fast it is, no test says."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import gpu_wheels, turns
from benchmarks.__main__ import spreads_of
from benchmarks.answers import (
    NORMAL,
    QUEUE,
    Ends,
    WrongAnswerError,
    check_backlog,
    check_equal,
    check_once,
    queued,
    rows,
    unsettled,
)
from benchmarks.parts import PARTS, RATIOS, measured, parts_of
from benchmarks.spread import ratios, spread, verdict
from benchmarks.stack import Figures

from tests.stacks import ENDS_S, Valkey, clean_environment

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=ENDS_S, check=False, cwd=ROOT, env=clean_environment()
    )


# -- statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "interval"), [(5, (None, None)), (6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (15, (4, 12)), (25, (8, 18))]
)
def test_the_interval_of_a_median_is_made_of_order_statistics(
    count: int, interval: tuple[float | None, float | None]
) -> None:
    """Those of tables of the binomial distribution for 95 %; five values are too few."""
    found = spread([float(value) for value in reversed(range(1, count + 1))])
    assert (found.low, found.high) == interval
    assert (found.median, found.least, found.most) == ((count + 1) / 2, 1, count)


def test_an_interval_covers_the_median_as_often_as_it_says() -> None:
    """Of samples of nine from a skewed distribution 96.1 % in theory, and about as many here."""
    chance = np.random.default_rng(0)
    found = [spread(chance.exponential(size=9).tolist()) for _ in range(400)]
    covered = [one.low is not None and one.high is not None and one.low <= np.log(2) <= one.high for one in found]
    assert 0.94 <= np.mean(covered) <= 0.98


def test_pairs_are_divided_one_by_one() -> None:
    """The second by the first, or the other way round where less is better: over 1 is better."""
    assert ratios([10, 20], [20, 10]) == [2, 0.5]
    assert ratios([10, 20], [20, 10], less_is_better=True) == [0.5, 2]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1, 2], [1])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.95] * 9, "reached"),
        ([1.2] * 9, "reached"),
        ([0.7] * 7 + [0.96] * 2, "not told apart"),
        ([0.7] * 8 + [0.96], "missed"),
        ([0.5] * 5, "not told apart"),
    ],
)
def test_a_figure_is_missed_only_where_its_whole_interval_is_below(values: list[float], said: str) -> None:
    """And reached where the median is at least 0.95; too few pairs say nothing."""
    assert verdict(spread(values)) == said


# -- by turns -----------------------------------------------------------------------------------------


def test_versions_take_turns(tmp_path: Path) -> None:
    """Every other turn the other way round; this one twice a turn; figures that one lacks are left out."""
    base, this = tmp_path / "base", tmp_path / "this"
    order: list[str] = []

    def measure(version: Path) -> Figures:
        order.append(version.name)
        speed = 100.0 if version == base else 120.0
        return {"drain_per_s": speed + len(order), "claim_us_1k": 1e6 / speed} | (
            {"publish_per_s": 1.0} if version == this else {}
        )

    lines: list[str] = []
    found = turns.take_turns(base, this, 9, measure, lines.append)
    assert order == ["base", "this", "this", "this", "this", "base"] * 4 + ["base", "this", "this"]
    assert len(lines) == 9
    comparisons = turns.compare(found)
    assert set(comparisons) == {"drain", "claim cost"}
    drain, claims = comparisons["drain"], comparisons["claim cost"]
    assert 1.1 < drain.against_base.median < 1.25 and drain.verdict == "reached"
    assert claims.against_base.median == pytest.approx(1.2)
    assert claims.against_itself.low == claims.against_itself.high == 1
    told = turns.table(comparisons, "v1", 9)
    assert "another interface: end to end, publish" in told and "1.000 to 1.000" in told
    report = json.loads(json.dumps(turns.report(comparisons, found, "v1")))
    assert report["ratios"].keys() == {"drain_per_s_vs_base", "claim_us_1k_vs_base"}
    assert len(report["turns"]) == 9


def test_another_version_is_measured_with_its_own_code(tmp_path: Path) -> None:
    """By this benchmark: what a stack of that folder's packages does, not of those that are installed."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no Git checkout: there are no other versions")
    with turns.checkout("HEAD") as version:
        # Sent to wherever the worker is started: proof that it is this code that runs.
        app = version / "workers" / "samphire_workers" / "app.py"
        app.write_text(app.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'a').close()\n")
        figures = turns.measure(version, ["drain"], 0.005)
    assert (tmp_path / "ran").exists()
    assert {"drain_per_s", "end_to_end_per_s", "publish_per_s"} <= figures.keys()


def test_a_commit_that_is_none_is_named() -> None:
    """By Git's own words."""
    with pytest.raises(SystemExit, match="nothing-like-it"), turns.checkout("nothing-like-it"):
        pass


# -- parts and figures --------------------------------------------------------------------------------


def test_a_figure_is_measured_with_what_it_is_compared_with() -> None:
    """And nothing else; without names, everything."""
    assert parts_of([]) == list(PARTS)
    assert parts_of(["claims"]) == ["claims"]
    assert parts_of(["drain_vs_celery", "latency"]) == ["latency", "celery", "drain"]
    assert {part for ratio in RATIOS.values() for part in ratio.parts} <= set(PARTS)


def test_what_was_not_reached_is_null() -> None:
    """A version that reads too slowly has no time for it, and the report is still JSON."""
    found = measured({"read_one_by_one_done": 3.0}, ["read-one-by-one"])
    expected = {"read_one_by_one_done": 3.0, "read_one_by_one_p50_ms": None, "read_one_by_one_round_trips": None}
    assert found == expected
    assert not RATIOS["read_one_by_one_p50_ms"].met(None)


def test_the_benchmark_runs_and_writes_its_report(tmp_path: Path) -> None:
    """A twentieth of the work: every ratio is there; how large they are is not for a test."""
    ended = run("benchmarks", "--quick", "--reads", "1000", "--results", tmp_path)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "latest.json").read_text())
    assert set(RATIOS) <= set(report["ratios"])
    late = ("read_one_by_one_p50_ms", "read_one_by_one_round_trips", "idle_share")
    assert all(isinstance(value, float) for name, value in report["ratios"].items() if name not in late)
    assert (tmp_path / "latest.png").stat().st_size > 0


def test_several_runs_have_a_median_and_a_range() -> None:
    """Of every figure that each of them has reached."""
    found = spreads_of([{"a": value, "b": value if value < 3 else None} for value in (3.0, 1.0, 2.0)])
    assert found.keys() == {"a"}
    assert (found["a"].median, found["a"].least, found["a"].most) == (2, 1, 3)


# -- answers ------------------------------------------------------------------------------------------


def test_a_wrong_or_missing_answer_is_noticed() -> None:
    """One bit is enough; so is one too many."""
    asked = rows(3)
    check_equal("these", asked, [row.copy() for row in asked])
    almost = asked[2].copy()
    almost.view(np.uint32)[0, 0] ^= 1
    for answers in ([*asked[:2], almost], [*asked[:2], None], asked[:2], [asked[1], asked[0], asked[2]]):
        with pytest.raises(WrongAnswerError, match="these"):
            check_equal("these", asked, answers)
    check_once("these", ["a", "b"])
    with pytest.raises(WrongAnswerError, match="more than once"):
        check_once("these", ["a", "b", "a"])


def tensor(row: np.ndarray) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [1, 16], "raw": base64.b64encode(row.tobytes()).decode()}


def test_a_backlog_is_looked_at_task_by_task(valkey: Valkey) -> None:
    """Its answers on the broker, and the events of its client's stream."""
    server, asked = valkey.client, rows(4)
    for number, row in enumerate(asked):
        body = json.dumps([[], {"model_name": "identity", "inputs": [tensor(row)]}, {}])
        server.lpush(
            QUEUE + NORMAL, json.dumps({"body": body, "headers": {"id": f"t{number}", "samphire_stream": "s"}})
        )
        found = {"data": row.tolist()} if number % 2 else tensor(row)  # either form is an answer
        server.set(f"celery-task-meta-t{number}", json.dumps({"status": "SUCCESS", "result": {"outputs": [found]}}))
    messages = queued(server)
    assert [json.loads(message)["headers"]["id"] for message in messages] == ["t0", "t1", "t2", "t3"]
    with Ends(valkey.url, "s") as ends:
        server.xadd("s", {"succeeded": "t0 t1 t2"})
        server.xadd("s", {"succeeded": "t3", "result": "{}"})
        server.xadd("s", {"retrying": "t3"})
    counted = ends.counted()
    assert counted == Counter(t0=1, t1=1, t2=1, t3=1)
    check_backlog(server, messages, counted)
    with pytest.raises(WrongAnswerError, match="not ended exactly once: t3"):
        check_backlog(server, messages, counted + Counter(t3=1))
    with pytest.raises(WrongAnswerError, match="not ended exactly once: t0"):
        check_backlog(server, messages, counted - Counter(t0=1))
    with pytest.raises(WrongAnswerError, match="only 4 ids"):
        check_backlog(server, [*messages, messages[0]], counted)
    server.zadd("samphire:dead", {"t9": 1})
    with pytest.raises(WrongAnswerError, match="1 dead letters"):
        check_backlog(server, messages, counted)
    for meta in ({"status": "FAILURE", "result": {}}, {"status": "SUCCESS", "result": {"outputs": [tensor(asked[0])]}}):
        server.set("celery-task-meta-t2", json.dumps(meta))
        with pytest.raises(WrongAnswerError, match="a wrong one: t2"):
            check_backlog(server, messages, counted)


def test_what_is_claimed_during_a_look_is_in_it(valkey: Valkey) -> None:
    """A backlog is not gone before its last message is settled: it is queued, or some worker has it."""
    queue, lease = QUEUE + NORMAL, "samphire:worker:w1:inflight"
    valkey.client.sadd("samphire:workers", "w1")
    valkey.client.lpush(queue, "message")
    stop, claims = threading.Event(), Counter[str]()

    def claim() -> None:
        while not stop.is_set():
            with valkey.client.pipeline() as taken:
                taken.lpop(queue).hset(lease, "1", "message").execute()
            with valkey.client.pipeline() as back:
                back.hdel(lease, "1").lpush(queue, "message").execute()
            claims["w1"] += 1

    worker = threading.Thread(target=claim)
    worker.start()
    try:
        looks = Counter(unsettled(valkey.client) for _ in range(1000))
    finally:
        stop.set()
        worker.join()
    assert looks == {1: 1000} and claims["w1"]


# -- on a GPU -----------------------------------------------------------------------------------------


def test_the_gpu_benchmark_runs_without_one(tmp_path: Path) -> None:
    """On the processor, with next to nothing to do: right answers, the table, the report."""
    short = ("--workers", "1", "2", "--seconds", "0.1", "--most", "200")
    ended = run("benchmarks.gpu", *short, "--results", tmp_path)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report == json.loads(ended.stdout.splitlines()[-1])
    ways = [(row["model"], row["way"].partition(",")[2].strip()) for row in report["rows"] if "Samphire" in row["way"]]
    assert ways == [(model, count) for model in ("identity", "classifier") for count in ("1 worker", "2 workers")]
    assert len(report["ratios"]) == 6 and all(value > 0 for value in report["ratios"].values())
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 6
    assert "of the straight client's best" in lines[0] and "GPU busy" in lines[0]


def test_wheels_are_made_smaller_and_weighed(tmp_path: Path) -> None:
    """What the other machine's Python needs stays, as it was, and is still listed."""
    wheel = tmp_path / "nvidia_pytriton-1-py3-none-any.whl"
    stubs = "pytriton/tritonserver/python_backend_stubs"
    kept = [f"{stubs}/3.12/stub", "pytriton/__init__.py", "nvidia_pytriton.libs/libz.so"]
    dropped = [
        f"{stubs}/3.11/stub",
        f"{stubs}/3.1/stub",
        "nvidia_pytriton.libs/libpython3-4.13.so.1.0",
        "numpy/tests/a.py",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, *dropped):
            archive.writestr(name, "content " * 1000)
        listed = "".join(f"{name},sha256=x,1\n" for name in (*kept, *dropped, "a.dist-info/RECORD"))
        archive.writestr("a.dist-info/RECORD", listed)
    before = wheel.stat().st_size
    gpu_wheels.repack(wheel, gpu_wheels.not_needed("3.12"))
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == {*kept, "a.dist-info/RECORD"}
        assert archive.read(kept[0]) == b"content " * 1000
        rows_ = [line.split(",")[0] for line in archive.read("a.dist-info/RECORD").decode().splitlines()]
    assert rows_ == [*kept, "a.dist-info/RECORD"]
    assert wheel.stat().st_size < before
    assert 0 < gpu_wheels.check_size(tmp_path, 1) < 1
    with pytest.raises(SystemExit, match=r"at most 0\.0001 are allowed; the largest: nvidia_pytriton"):
        gpu_wheels.check_size(tmp_path, 0.0001)
