"""The application, for `INSTALLED_APPS`."""

from django.apps import AppConfig


class SamphireConfig(AppConfig):
    """Has the outbox table."""

    name = "samphire.contrib.django"
    label = "samphire"
    verbose_name = "Samphire"
    default_auto_field = "django.db.models.BigAutoField"
