"""Every setting of a deployment: environment variables with the prefix `SAMPHIRE_`, checked when read.

Units stand in names (`_s`, `_ms`, `_bytes`). A bad value is refused at start, with the setting's name.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from samphire.errors import InvalidInputError
from samphire.transport.address import DEFAULT_BROKER_URL, Address, Broker, broker_of
from samphire.wire.contract import ATTEMPTS_MAX, BACKOFF_MAX_S, LONGEST_S, Backoff
from samphire.wire.endpoints import Policy
from samphire.wire.keys import DEFAULT_NAMESPACE, Keys, checked_namespace
from samphire_broker.webhooks.endpoint import check_schedule
from samphire_broker.webhooks.secrets import SecretBox

FsyncPolicy = Literal["always", "everysec"]

ENV_PREFIX = "SAMPHIRE_"
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


class ModelRetry(BaseModel):
    """What is different for one model; the rest is as for all."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_attempts: int | None = Field(default=None, ge=1, le=ATTEMPTS_MAX)
    backoff_base_s: float | None = Field(default=None, ge=0, le=BACKOFF_MAX_S)
    backoff_cap_s: float | None = Field(default=None, ge=0, le=BACKOFF_MAX_S)
    backoff_jitter: float | None = Field(default=None, ge=0, le=1)


class Settings(BaseSettings):
    """Settings of the worker and of the embedded stack.

    Read them with `read_settings`, which names what is wrong as it was written.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", allow_inf_nan=False
    )

    broker_url: str = DEFAULT_BROKER_URL
    """Redis or Valkey: `redis://[user:password@]host:port/database`; see `samphire.transport.address`."""

    namespace: str = DEFAULT_NAMESPACE
    """What every own key begins with; another deployment on the same database needs another, and another Celery key
    prefix."""

    celery_key_prefix: str = ""
    """Celery's `global_keyprefix`, of the broker and of the result backend."""

    triton_urls: Annotated[tuple[str, ...], NoDecode] = ("localhost:8001",)
    """`host:port` of each Triton's gRPC endpoint, comma-separated."""

    triton_timeout_s: float = Field(default=60.0, gt=0, le=LONGEST_S)
    """How long one inference may take before it is given up as timed out."""

    result_ttl_s: int = Field(default=3600, gt=0, le=LONGEST_S)
    """How long a result stays readable."""

    remember_s: int = Field(default=7200, gt=0, le=LONGEST_S)
    """How long it is remembered at least, and at most twice as long, that and how a task has ended: a copy of its
    message that comes later runs again. Never shorter than results live."""

    dead_letter_ttl_s: int = Field(default=14 * 86400, gt=0, le=LONGEST_S)
    """How long a dead letter is kept."""

    dead_letters_max: int = Field(default=100_000, ge=1)
    """Most dead letters that are kept, the newest; workers warn from 80 % of it, and of the lifetime, on."""

    lease_s: float = Field(default=12.0, ge=1, le=LONGEST_S)
    """A worker whose heartbeat is older than this has lost its claims; others take over within 3 s more."""

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

    unserved_timeout_s: float | None = Field(default=None, gt=0, le=LONGEST_S)
    """The tasks of a model that no endpoint has served since the worker knows of it fail after so long. By default they
    wait until it is loaded, as those of a model that was served before always do."""

    shutdown_timeout_s: float = Field(default=60.0, ge=0, le=LONGEST_S)
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

    streams_per_model: int = Field(default=256, ge=1)
    """Most requests of a model that streams its outputs which a worker has under way at once."""

    stream_max_outputs: int = Field(default=1_000_000, ge=1)
    """Most outputs of one task that streams; a model that gives out more is stopped, and the task fails."""

    stream_max_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Most bytes of these outputs together."""

    collect_max_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Most bytes of them that are kept for a result which collects them: worker and result hold all at once."""

    micro_batch: dict[str, bool] = Field(default_factory=dict)
    """JSON object of model name to whether its requests are joined into micro-batches; without an entry they are where
    the model's config has `dynamic_batching`."""

    separate_tenants: bool = False
    """Whether micro-batches never hold requests of two tenants."""

    events_per_s: int = Field(default=600, ge=0)
    """Cap of the Celery task events that a worker sends; events of failures are always sent."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port on which each worker answers Prometheus; 0: none does. Workers on one machine need one each."""

    metrics_host: str = "127.0.0.1"
    """Address that it listens on."""

    queue_weights: dict[str, int] = Field(default_factory=dict)
    """JSON object of model name to its weight in the round robin over models (default 1 each)."""

    data_dir: Path = Path("~/.local/share/samphire")
    """The data directory of `samphire up`; the key of the secrets stands there where `secret_key` is not set."""

    secret_key: SecretStr = SecretStr("")
    """Under which secrets of webhooks are encrypted on the broker: base64 of 32 bytes; several, comma-separated, while
    one replaces another (the first encrypts)."""

    gateway_url: str = ""
    """Where clients reach the gateway: webhooks link to results there; without it they name the command."""

    webhook_schemes: Annotated[tuple[Literal["https", "http"], ...], NoDecode] = ("https",)
    """Schemes of the URLs that webhooks are sent to, comma-separated."""

    webhook_ports: Annotated[tuple[int, ...], NoDecode] = (443, 8443)
    """Their ports, comma-separated."""

    webhook_allow_private: bool = False
    """Whether webhooks may go to private and loopback addresses; to link-local and reserved ones they never do."""

    webhook_nameservers: Annotated[tuple[str, ...], NoDecode] = ()
    """DNS servers (`address` or `address:port`, comma-separated) that are asked for them; by default the system's."""

    webhook_timeout_s: float = Field(default=15.0, gt=0, le=300)
    """How long one attempt of a delivery may take in all."""

    webhook_schedule_s: Annotated[tuple[float, ...], NoDecode] = (0, 5, 300, 1800, 7200, 18000, 36000, 36000)
    """Waits before the attempts of a delivery, comma-separated; after the last it is a dead letter."""

    webhook_concurrency: int = Field(default=32, ge=1, le=256)
    """Most deliveries to one endpoint at once, where the endpoint says nothing else."""

    webhook_inflight_max: int = Field(default=512, ge=1, le=4096)
    """Most deliveries that one worker has under way."""

    webhook_disable_after_s: float = Field(default=5 * 86400.0, ge=60, le=LONGEST_S)
    """An endpoint that has only failed for so long is disabled."""

    webhook_keep_s: int = Field(default=3 * 86400, gt=0, le=LONGEST_S)
    """How long a delivery that has ended can be looked at and sent again."""

    webhook_keep_max: int = Field(default=10_000, ge=1)
    """How many of these are kept for each endpoint."""

    @field_validator("webhook_schemes", "webhook_ports", "webhook_nameservers", "webhook_schedule_s", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("webhook_schemes", "webhook_ports")
    @classmethod
    def _check_some(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if not values:
            raise ValueError("expected at least one, given none")
        return values

    @field_validator("webhook_schedule_s")
    @classmethod
    def _check_schedule(cls, waits_s: tuple[float, ...]) -> tuple[float, ...]:
        return check_schedule(waits_s)

    @field_validator("secret_key")
    @classmethod
    def _check_secret_key(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value():
            SecretBox(value.get_secret_value(), Path())
        return value

    @field_validator("gateway_url")
    @classmethod
    def _check_gateway_url(cls, url: str) -> str:
        if url and not re.fullmatch(r"https?://[^\s?#]+", url):
            raise ValueError(f"expected a URL such as https://inference.example.com, given {url[:200]!r}")
        return url.rstrip("/")

    @field_validator("broker_url")
    @classmethod
    def _check_broker_url(cls, url: str) -> str:
        Address.parse(url)
        return url

    @field_validator("metrics_host")
    @classmethod
    def _check_metrics_host(cls, host: str) -> str:
        if not _HOST.fullmatch(host):
            raise ValueError(f"expected a host name or an address, given {host!r}")
        return host

    @field_validator("namespace")
    @classmethod
    def _check_namespace(cls, namespace: str) -> str:
        return checked_namespace(namespace)

    @field_validator("celery_key_prefix")
    @classmethod
    def _check_celery_key_prefix(cls, prefix: str, info: ValidationInfo) -> str:
        return Keys(info.data.get("namespace", DEFAULT_NAMESPACE), prefix).celery_prefix

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
            host, _, port = url.rpartition(":")
            if not (_HOST.fullmatch(host) and port.isdecimal() and 0 < int(port) < 65536):
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

    @property
    def remembered_s(self) -> int:
        """How long ends are remembered: what has a result is always remembered too."""
        return max(self.remember_s, self.result_ttl_s)

    def secret_box(self) -> SecretBox:
        """What encrypts secrets, and reads them."""
        return SecretBox(self.secret_key.get_secret_value(), self.data_dir)

    def webhook_policy(self, key_ids: tuple[str, ...] = ()) -> Policy:
        """Which URLs webhooks may go to."""
        return Policy(tuple(self.webhook_schemes), self.webhook_ports, self.webhook_allow_private, key_ids)

    @cached_property
    def broker(self) -> Broker:
        """Where the broker is, and what its keys are called."""
        return broker_of(self.broker_url, self.namespace, self.celery_key_prefix)

    @cached_property
    def lease_ms(self) -> int:
        """The lease in milliseconds, as the scripts take it."""
        return int(self.lease_s * 1000)


def read_settings(**known: Any) -> Settings:
    """The settings of the environment; those that are `known` are not looked up there.

    Raises:
        InvalidInputError: some are malformed; the message names each as the environment variable that it is.
    """
    try:
        return Settings(**known)
    except ValidationError as error:
        raise InvalidInputError("; ".join(_named(part["loc"], part["msg"]) for part in error.errors())) from error
    except SettingsError as error:  # what is to be JSON and is none
        field = re.search(r'field "(\w+)"', str(error))
        raise InvalidInputError(_named((field[1],) if field else ("settings",), "expected JSON")) from error


def _named(place: tuple[int | str, ...], message: str) -> str:
    name, *inner = map(str, place)
    where = f"{ENV_PREFIX}{name.upper()}" + (f" ({'.'.join(inner)})" if inner else "")
    return f"{where}: {message.removeprefix('Value error, ')}"


def shipped_model_repository() -> Path:
    """The folder of the models that ship with Samphire: in the wheel, or in a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "embedded" / "model_repository"
    return packaged if packaged.is_dir() else here.parents[1] / "model_repository"
