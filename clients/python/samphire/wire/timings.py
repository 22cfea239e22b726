"""Where the time of an inference went, as its result tells it."""

from __future__ import annotations

from msgspec import Struct


class Timings(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where the time of an inference went, in s; points in time are in s since 1970, by the broker's clock.

    `waited_s`, `triton_s` and `settling_s` follow each other; one worker measures them, by a clock that does not step.
    """

    settled_at: float
    """When its end was handed over to be written."""
    queued_s: float | None = None
    """From the submit until the worker that answered has claimed it: delays and earlier attempts are in it. None where
    the producer does not say when it was submitted, as plain Celery producers do not."""
    waited_s: float
    """From the claim to the call of Triton that answered it: it was read, checked, and waited for its micro-batch and a
    free place; of a sequence, for the requests before it; of a batch that was asked again in parts, for these calls."""
    triton_s: float
    """The call of Triton, as the worker saw it; of a model that streams the whole stream."""
    triton_queue_s: float | None = None
    """Of that, in Triton's own queue. Triton tells no request this; it is the mean of the requests to this version of
    the model that Triton has ended between the worker's last two looks (before the first one: since it was loaded). A
    look follows an answer, at most one a second. None where Triton does not tell, or has ended none in between."""
    triton_compute_s: float | None = None
    """The same for what the model took, copies of inputs and outputs with it."""
    settling_s: float
    """From the answer until the end was handed over: the answer was taken apart, and large outputs were stored."""
    attempts: int
    """How often it was tried, this time with it."""
    batch_size: int
    """Tasks of its micro-batch, itself with them."""
    worker: str
    """Name of the worker that answered."""

    @property
    def claimed_at(self) -> float:
        """When the worker that answered has claimed it."""
        return self.settled_at - self.settling_s - self.triton_s - self.waited_s

    @property
    def submitted_at(self) -> float | None:
        """When it was submitted; None where the producer does not say so."""
        return None if self.queued_s is None else self.claimed_at - self.queued_s

    def __str__(self) -> str:
        parts = [] if self.queued_s is None else [f"queued {_time(self.queued_s)}"]
        parts.append(f"waited {_time(self.waited_s)} for a batch of {self.batch_size}")
        inside = [
            f"{what} {_time(seconds)}"
            for what, seconds in (("queue", self.triton_queue_s), ("compute", self.triton_compute_s))
            if seconds is not None
        ]
        parts.append(f"Triton {_time(self.triton_s)}" + (f" (on average {', '.join(inside)})" if inside else ""))
        parts.append(f"settling {_time(self.settling_s)}")
        return ", ".join(parts) + f"; attempt {self.attempts}, worker {self.worker}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
