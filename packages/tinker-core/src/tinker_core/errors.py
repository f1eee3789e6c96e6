"""Every error the system raises on purpose: one base, one class per cause.

An error has a ``category``: ``"user"`` means that the caller can fix it by changing the request, ``"server"`` that they
cannot.  The message says what to do.  Errors know nothing of HTTP; ``tinker_server.errors`` maps them to status codes.
Errors cross process borders as `tinker_core.types.RequestError`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Category = Literal["user", "server"]


class TinkerError(Exception):
    """Base of all deliberate errors."""

    category: ClassVar[Category] = "server"


class UserError(TinkerError):
    """Base of the errors that the caller can fix."""

    category: ClassVar[Category] = "user"


# --- things that do not exist -----------------------------------------------------------------------------------------


class UnknownSessionError(UserError, LookupError):
    """A session id that this server never issued."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"unknown session {session_id!r}; create one with create_session")


class SessionFinishedError(UserError):
    """New work for a session that its client has finished."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} is finished; create a new session for new work")


class ForeignSessionError(UserError):
    """Work for a session that was opened at another server, which shares this one's control database."""

    def __init__(self, session_id: str, server_id: str) -> None:
        super().__init__(
            f"session {session_id!r} belongs to another server ({server_id}) that shares this one's records; "
            "go on at that server, or create a new session"
        )
        self.session_id = session_id
        self.server_id = server_id

    def __reduce__(self) -> tuple[type[ForeignSessionError], tuple[str, str]]:
        return type(self), (self.session_id, self.server_id)


class UnknownModelError(UserError, LookupError):
    """A model id that does not exist, or whose session is finished."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"unknown model {model_id!r}; create it with create_model, or load it from a saved checkpoint")


class UnknownBaseModelError(UserError, LookupError):
    """A base model that this server does not serve."""

    def __init__(self, base_model: str, served: tuple[str, ...]) -> None:
        known = ", ".join(repr(name) for name in served) or "none"
        super().__init__(f"unknown base model {base_model!r}; this server serves {known}")


class UnknownRequestError(UserError, LookupError):
    """A request id that was never issued, or whose result was dropped after its retention time."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"unknown request {request_id!r}; it was never issued, or its result is no longer kept")


class ResultGoneError(UserError):
    """A request of this owner whose result is no longer kept, or ended with an earlier server process."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"the result of request {request_id!r} is gone; send the request again")


class CancelledRequestError(UserError):
    """A request that its own client cancelled."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id!r} was cancelled by its client")


class UnseenClientError(UserError):
    """A sample that had not begun when its client had given no sign of life for long."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the sample was dropped before it began: {detail}; sample again")


class UnknownSamplerError(UserError, LookupError):
    """A sampling session id that does not exist."""

    def __init__(self, sampling_session_id: str) -> None:
        super().__init__(f"unknown sampling session {sampling_session_id!r}; create one with create_sampling_session")


class UnknownCheckpointError(UserError, LookupError):
    """A tinker path that names no saved checkpoint."""

    def __init__(self, path: str) -> None:
        super().__init__(f"no checkpoint {path!r}; list the saved ones with list_user_checkpoints")


class ForeignCheckpointError(UserError):
    """A checkpoint whose files another server has, which shares this one's control database."""

    def __init__(self, path: str, server_id: str) -> None:
        super().__init__(
            f"the files of checkpoint {path!r} are with another server ({server_id}) that shares this one's records; "
            "use it there, or have both servers use one --checkpoint-store"
        )
        self.path = path
        self.server_id = server_id

    def __reduce__(self) -> tuple[type[ForeignCheckpointError], tuple[str, str]]:
        return type(self), (self.path, self.server_id)


class LostWeightsError(UserError, LookupError):
    """Sampler weights that cannot be had any more; names the cause."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"the sampler weights {name!r} are gone: {cause}; save the weights again")


class UnknownKeyError(UserError, LookupError):
    """An API key id that does not exist."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"unknown API key {key_id!r}; 'tinker-server keys list' shows the ids of all keys")


class UnknownAccessTokenError(UserError, LookupError):
    """An access token id that does not exist."""

    def __init__(self, token_id: str) -> None:
        super().__init__(f"unknown access token {token_id!r}; 'tinker-server tokens list' shows the ids of all tokens")


# --- who may do what --------------------------------------------------------------------------------------------------


class AuthenticationError(UserError):
    """A request without a valid API key or token; the message never says whether a key exists."""

    def __init__(self, message: str, *, invalid_token: bool = False) -> None:
        self.invalid_token = invalid_token
        """Whether a token was refused that the client can exchange its API key anew for."""
        super().__init__(message)


class KeyLimitError(UserError):
    """A limit of the API key is reached that waiting does not lift; names the limit."""


class RateLimitError(UserError):
    """A limit of the API key is reached that lifts by itself; names the limit and the seconds to wait."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        """Seconds after which the same request may succeed."""
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RateLimitError], tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


# --- requests that cannot be served -----------------------------------------------------------------------------------


class InvalidRequestError(UserError, ValueError):
    """A field with a value outside what it allows; the message names the field and the allowed values."""


class InvalidDatumError(InvalidRequestError):
    """A datum whose tensors are missing, of the wrong length, type or value; names the datum and the field."""

    def __init__(self, index: int, reason: str) -> None:
        self.index = index
        self.reason = reason
        super().__init__(f"data[{index}]: {reason}")

    def __reduce__(self) -> tuple[type[InvalidDatumError], tuple[int, str]]:
        return type(self), (self.index, self.reason)


class UnknownLossError(InvalidRequestError):
    """A loss that no installed plugin registers."""

    def __init__(self, loss_fn: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown loss_fn {loss_fn!r}; known losses: {', '.join(known)}")


class InvalidLossConfigError(InvalidRequestError):
    """A loss_fn_config with a missing, unknown or mistyped key; names the key."""


class UnknownCustomLossError(UserError, LookupError):
    """A loss_id that this session never created."""

    def __init__(self, loss_id: str) -> None:
        super().__init__(f"unknown custom loss {loss_id!r}; create it with create_custom_loss in the same session")


class InvalidCustomLossError(InvalidRequestError):
    """A traced loss that is malformed, too large, or names an operation that is not offered; names the node."""


class InvalidLoraConfigError(InvalidRequestError):
    """A LoRA configuration that cannot be built; names the field and its limits."""


class InvalidTinkerPathError(InvalidRequestError):
    """A string that is not ``tinker://<run>/<kind>/<name>``."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"malformed tinker path {path!r}: {reason}")

    def __reduce__(self) -> tuple[type[InvalidTinkerPathError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class UnsupportedFeatureError(InvalidRequestError):
    """A feature of the API that this server, trainer or sampler does not offer; names the alternative if any."""


class CheckpointExistsError(InvalidRequestError):
    """A second save under one name without ``overwrite``."""

    def __init__(self, path: str) -> None:
        super().__init__(f"checkpoint {path!r} exists; choose another name, or pass overwrite=True")


class CheckpointMismatchError(InvalidRequestError):
    """A checkpoint that does not fit the model it is loaded into."""


class CapacityError(UserError):
    """A limit of this server is reached; names the limit and the flag that raises it."""


class SkippedSequenceError(UserError):
    """A request whose seq_id had already been passed over."""

    def __init__(self, model_id: str, seq_id: int) -> None:
        super().__init__(
            f"request seq_id={seq_id} of model {model_id!r} arrived after later requests had already run; send it again"
        )


# --- failures of a computation or a process ---------------------------------------------------------------------------


class NonFiniteError(UserError, ArithmeticError):
    """A loss or gradient that is NaN or infinite; the request committed nothing."""


class WorkerLostError(TinkerError):
    """A worker process of a base model died; its models and requests are gone."""


class ModelLostError(TinkerError):
    """A model that could not be brought back after its workers were gone; names the cause."""

    def __init__(self, model_id: str, reason: str) -> None:
        self.model_id = model_id
        self.reason = reason
        super().__init__(
            f"model {model_id!r} could not be brought back: {reason}; load a saved checkpoint into a new one"
        )

    def __reduce__(self) -> tuple[type[ModelLostError], tuple[str, str]]:
        return type(self), (self.model_id, self.reason)


class StorageError(TinkerError):
    """A checkpoint or a control record could not be written, read or removed; the message carries the cause."""


class DatabaseUnavailableError(StorageError):
    """The control database cannot be reached; what needs it succeeds again as soon as it is back."""

    def __init__(self) -> None:
        super().__init__("the control database cannot be reached at the moment; try again")


class JournalFullError(TinkerError):
    """The journal takes no more requests: its byte bound is reached, or its disk is full. With room it will again."""


class JournalError(TinkerError):
    """The journal cannot be written or read; what was not acknowledged must not be. The engine has to stop."""


class DamagedRecordError(TinkerError):
    """A journalled record or a snapshot whose checksum does not fit; names the file. It is never used."""


# --- set-up -----------------------------------------------------------------------------------------------------------


class ConfigurationError(TinkerError):
    """A setting that cannot work; raised at start, names the setting and the fix."""


class AgreementError(ConfigurationError):
    """Trainer and sampler give different log-probabilities to the same tokens; names what to suspect."""


class PluginError(ConfigurationError):
    """A plugin that cannot be used: unknown, claimed twice, or with a hook that does not exist."""
