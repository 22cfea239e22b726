"""The keys of a deployment that has set nothing."""

from samphire.wire.keys import Keys

KEYS = Keys()
