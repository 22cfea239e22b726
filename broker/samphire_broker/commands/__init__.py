"""What the `samphire` command can do."""

import click

from samphire_broker.commands.dead_letters import dead_letters
from samphire_broker.commands.doctor import doctor
from samphire_broker.commands.models import models
from samphire_broker.commands.tasks import cancel, queues, result, submit, watch
from samphire_broker.commands.up import demo, up
from samphire_broker.commands.webhooks import webhooks


@click.group()
@click.version_option(package_name="samphire")
def samphire() -> None:
    """Asynchronous inference: Celery queues in front of Triton.

    Commands for tasks take the broker from SAMPHIRE_BROKER_URL or --broker-url. Results go to stdout, progress and
    errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 broker away, 4 no answer in time.
    """


for command in (up, demo, submit, watch, result, cancel, queues, dead_letters, webhooks, models, doctor):
    samphire.add_command(command)
