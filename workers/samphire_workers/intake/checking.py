"""A request checked against its model before it is loaded; those alike in all but their numbers are checked once."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import UNSET

from samphire.errors import InvalidInputError
from samphire.wire import keys
from samphire.wire.contract import InferRequest, InputTensor, Ref
from samphire.wire.signature import ModelSignature, check_request_size
from samphire.wire.tensors import ITEM_SIZES, element_count
from samphire_broker.settings import Settings
from samphire_workers.intake.parents import sources_of
from samphire_workers.intake.request import Request

FORMS_MAX = 1024
FORM_MAX_CHARACTERS = 64 * 2**10

MICRO_BATCH = "micro_batch"
"""A parameter for the lane, which the model does not see: false keeps a request alone, "tenant" joins it with requests
of its own tenant only."""
OWN_TENANT = "tenant"
MICRO_BATCH_WISHES = (None, True, False, OWN_TENANT)
_encode_json = msgspec.json.Encoder(order="deterministic").encode


class Checked(NamedTuple):
    """What checking a request against a model found out."""

    rows: int
    version: str
    nbytes: int
    batch_key: object


class Checker:
    """Checks requests against one model. Requests alike in all but their numbers are checked once."""

    def __init__(self, signature: ModelSignature, settings: Settings, *, may_join: bool = True) -> None:
        self.signature = signature
        self._max_request_bytes = settings.max_request_bytes
        self._separate_tenants = settings.separate_tenants
        wanted = settings.micro_batch.get(signature.name, signature.dynamic_batching)
        self.joins = may_join and wanted and signature.max_batch_size > 0
        self.joins = self.joins and not signature.sequence_batching and not signature.decoupled
        """Whether requests of the model are joined into micro-batches."""
        self._known: dict[object, Checked] = {}

    def check(self, request: Request) -> None:
        """Check a request and note what it will take.

        Raises:
            InvalidInputError: it does not fit the model, or its parts contradict each other.
        """
        infer = request.request
        form = _form(infer, self._separate_tenants)
        found = self._known.get(form) if form is not None else None
        if found is None:
            found = self._check(request)
            if form is not None and len(self._known) < FORMS_MAX:
                self._known[form] = found
        request.rows, request.version, request.nbytes, request.batch_key = found
        request.signature = self.signature

    def _check(self, request: Request) -> Checked:
        infer = request.request
        version = self.signature.resolve(infer.version)
        rows = self.signature.check(infer)
        sources = [source for tensor in infer.inputs for source in sources_of(tensor)]
        sizes = [(source.name, _size(source, request)) for source in sources]
        check_request_size(sizes, self._max_request_bytes)
        request.json_values = any(source.data is not UNSET for source in sources)
        return Checked(rows, version, sum(size for _, size in sizes), self._batch_key(infer, version))

    def _batch_key(self, infer: InferRequest, version: str) -> object:
        """What requests must have in common to share a micro-batch; None where none may."""
        wish = infer.parameters.get(MICRO_BATCH)
        if wish not in MICRO_BATCH_WISHES:
            raise InvalidInputError(
                f"parameter {MICRO_BATCH!r}: expected true, false or {OWN_TENANT!r}, given {str(wish)[:100]!r}"
            )
        if not self.joins or wish is False:
            return None
        return (
            version,
            infer.tenant if self._separate_tenants or wish == OWN_TENANT else None,
            tuple((t.name, t.datatype, *t.shape[1:]) for t in infer.inputs),
            tuple(output.name for output in infer.outputs),
            _encode_json(infer.parameters) if infer.parameters else b"",
        )


def _form(infer: InferRequest, separate_tenants: bool) -> object:
    """What the check of a small request depends on; None where it depends on more."""
    if infer.parameters or infer.outputs or infer.model_version:
        return None
    parts: list[object] = [infer.tenant] if separate_tenants else []
    for tensor in infer.inputs:
        if tensor.datatype == "BYTES" or not isinstance(tensor.raw, str) or len(tensor.raw) > FORM_MAX_CHARACTERS:
            return None
        if tensor.data is not UNSET or tensor.ref is not UNSET:
            return None
        parts += (tensor.name, tensor.datatype, len(tensor.raw), *tensor.shape)
    return tuple(parts)


def _size(tensor: InputTensor, request: Request) -> int:
    sources = [source for source in (tensor.data, tensor.raw, tensor.ref) if source is not UNSET]
    if len(sources) != 1:
        raise InvalidInputError(
            f"input {tensor.name!r}: expected exactly one of data, raw, ref and from, given {len(sources)}"
        )
    if isinstance(tensor.ref, Ref):
        tenants = keys.result_blobs_of(request.request.tenant)
        if not (keys.is_blob_of(tensor.ref.key, request.task_id) or tensor.ref.key.startswith(tenants)):
            raise InvalidInputError(
                f"input {tensor.name!r}: expected a ref to one of the task's own claim checks, "
                f"{keys.BLOB_PREFIX}{request.task_id}:<number>, or to an output of its tenant's, {tenants}…, given "
                f"{tensor.ref.key[:200]!r}; the steps of a chain that hand outputs on have the same tenant"
            )
        if not 0 <= tensor.ref.size < 2**63:
            raise InvalidInputError(f"input {tensor.name!r}: expected a size of at least 0 and below 2**63")
        return tensor.ref.size
    claimed = element_count(tensor.shape) * ITEM_SIZES.get(tensor.datatype, 0)
    text = len(tensor.raw) if isinstance(tensor.raw, str) else len(bytes(tensor.data))  # type: ignore[arg-type]
    if claimed > 8 * max(text, 1):  # even "0," in JSON gives 8 bytes; more is a shape that lies
        raise InvalidInputError(
            f"input {tensor.name!r}: shape {tensor.shape} of {tensor.datatype} takes {claimed} bytes, "
            f"given {text} characters"
        )
    return max(claimed, text)
