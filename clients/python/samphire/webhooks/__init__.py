"""Webhooks: what receivers need to trust one, what signs them, and where they may be sent to."""

from samphire.errors import WebhookVerificationError
from samphire.webhooks.verifying import WebhookEvent, verify

__all__ = ["WebhookEvent", "WebhookVerificationError", "verify"]
