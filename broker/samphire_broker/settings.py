"""Every setting of a deployment: environment variables with the prefix `SAMPHIRE_`, checked when read.

Units stand in names (`_s`, `_ms`, `_bytes`). A bad value is refused at start, with the setting's name.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from samphire.connection import DEFAULT_BROKER_URL
from samphire.contract import ATTEMPTS_MAX, BACKOFF_MAX_S, Backoff

FsyncPolicy = Literal["always", "everysec"]


class ModelRetry(BaseModel):
    """What is different for one model; the rest is as for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_attempts: int | None = Field(default=None, ge=1, le=ATTEMPTS_MAX)
    backoff_base_s: float | None = Field(default=None, ge=0, le=BACKOFF_MAX_S)
    backoff_cap_s: float | None = Field(default=None, ge=0, le=BACKOFF_MAX_S)
    backoff_jitter: float | None = Field(default=None, ge=0, le=1)


class Settings(BaseSettings):
    """Settings of the worker and of the embedded stack.

    Raises:
        pydantic.ValidationError: a value has the wrong type or is out of range; the message names it.
    """

    model_config = SettingsConfigDict(env_prefix="SAMPHIRE_", frozen=True, extra="ignore")

    broker_url: str = DEFAULT_BROKER_URL
    """Redis or Valkey: `redis://[user:password@]host:port/db`."""

    triton_urls: Annotated[tuple[str, ...], NoDecode] = ("localhost:8001",)
    """`host:port` of each Triton's gRPC endpoint, comma-separated."""

    triton_timeout_s: float = Field(default=60.0, gt=0)
    """How long one inference may take before it is given up as timed out."""

    result_ttl_s: int = Field(default=3600, gt=0)
    """How long a result stays readable."""

    dead_letter_ttl_s: int = Field(default=14 * 86400, gt=0)
    """How long a dead letter is kept."""

    dead_letters_max: int = Field(default=100_000, ge=1)
    """Most dead letters that are kept, the newest; workers warn from 80 % of it, and of the lifetime, on."""

    lease_s: float = Field(default=15.0, ge=1)
    """A worker whose heartbeat is older than this has lost its claims."""

    max_attempts: int = Field(default=3, ge=1, le=ATTEMPTS_MAX)
    """How often a task is tried, over failed attempts and lost workers together, before it becomes a dead letter."""

    backoff_base_s: float = Field(default=0.5, ge=0, le=BACKOFF_MAX_S)
    """Longest wait before the second attempt; it doubles with each."""

    backoff_cap_s: float = Field(default=60.0, ge=0, le=BACKOFF_MAX_S)
    """Longest wait of all."""

    backoff_jitter: float = Field(default=1.0, ge=0, le=1)
    """The part of the wait that is drawn by lot: 1 is full jitter."""

    model_retries: dict[str, ModelRetry] = Field(default_factory=dict)
    """JSON object: by model, an object with its own max_attempts, backoff_base_s, backoff_cap_s, backoff_jitter."""

    shutdown_timeout_s: float = Field(default=60.0, ge=0)
    """How long a worker that is asked to end goes on with what it holds; then it hands it back."""

    claim_max: int = Field(default=128, ge=1, le=1000)
    """Most messages that one claim moves."""

    inflight_max: int = Field(default=512, ge=1)
    """Most tasks that one worker holds between claim and settlement."""

    inflight_max_bytes: int = Field(default=24 * 2**20, ge=2**20)
    """Most bytes of tensors and messages that one worker holds."""

    max_message_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Largest message, compressed or not, that is read from a queue; larger tensors travel as claim checks."""

    max_request_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Largest sum of a request's tensors, claim checks included."""

    inline_output_bytes: int = Field(default=8 * 2**10, ge=0)
    """Outputs over this size go to SDK clients as claim checks."""

    events_per_s: int = Field(default=600, ge=0)
    """Cap of the Celery task events that a worker sends; events of failures are always sent."""

    queue_weights: dict[str, int] = Field(default_factory=dict)
    """JSON object of model name to its weight in the round robin over models (default 1 each)."""

    @field_validator("triton_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(url.strip() for url in value.split(",") if url.strip())

    @field_validator("triton_urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError("expected at least one host:port, given none")
        for url in urls:
            host, colon, port = url.rpartition(":")
            if not (host and colon and port.isdigit()) or "//" in url:
                raise ValueError(f"expected host:port of a gRPC endpoint (no scheme), given {url!r}")
        return urls

    @field_validator("queue_weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, int]) -> dict[str, int]:
        for model, weight in weights.items():
            if weight < 1:
                raise ValueError(f"expected a weight of at least 1 for {model!r}, given {weight}")
        return weights

    def backoff(self, model: str) -> Backoff:
        """How long tasks of a model wait before they are tried again."""
        own = self.model_retries.get(model, ModelRetry())
        base_s, cap_s, jitter = own.backoff_base_s, own.backoff_cap_s, own.backoff_jitter
        return Backoff(
            self.backoff_base_s if base_s is None else base_s,
            self.backoff_cap_s if cap_s is None else cap_s,
            self.backoff_jitter if jitter is None else jitter,
        )

    @cached_property
    def lease_ms(self) -> int:
        """The lease in milliseconds, as the scripts take it."""
        return int(self.lease_s * 1000)


def shipped_model_repository() -> Path:
    """The folder of the models that ship with Samphire: in the wheel, or in a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "embedded" / "model_repository"
    return packaged if packaged.is_dir() else here.parents[1] / "model_repository"
