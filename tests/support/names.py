"""The keys of a deployment that has set nothing."""

from samphire.keys import Keys

KEYS = Keys()
