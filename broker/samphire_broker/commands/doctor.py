"""`samphire doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from samphire_broker.commands.output import FAILED, print_json, say, with_broker_url
from samphire_broker.shown import shown

MARKS = {"ok": "ok", "warning": "WARN", "error": "FAIL", "skipped": "-"}


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path, dir_okay=False), help="Pack a support file (.zip), without secrets."
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    envvar="SAMPHIRE_DATA_DIR",
    help="The stack's data directory: its Triton is asked unless another is named, its logs go into the support file.",
)
@with_broker_url
def doctor(broker_url: str | None, as_json: bool, bundle: Path | None, data_dir: Path | None) -> None:
    """Check everything that could be wrong, and say how to mend it; fails if something is."""
    from samphire_broker.inspection.bundle import write_bundle
    from samphire_broker.inspection.checks import examine  # its packages take a second to load

    findings = []
    for finding in examine(broker_url, lambda line: say(shown(f"{line} …")), data_dir):
        findings.append(finding)
        if as_json:
            print_json(asdict(finding))
            continue
        click.echo(shown(f"{MARKS[finding.state]:<4}  {finding.name}: {finding.found}"))
        if finding.remedy:
            click.echo(shown(f"      -> {finding.remedy}"))
    if bundle is not None:
        write_bundle(bundle, findings, broker_url, data_dir)
        say(f"wrote {bundle}")
    if any(finding.state == "error" for finding in findings):
        raise click.exceptions.Exit(FAILED)
