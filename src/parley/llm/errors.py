"""What can go wrong with a model, by who must act.

The code of a `ModelError` is one of the codes of `reply.failed` in the protocol. No message holds a provider's text:
providers echo prompts and parts of keys in theirs.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from parley.core.errors import Invalid, NotFound, ProviderFailed, Unavailable

Actor = Literal["caller", "operator", "provider", "model"]


class ModelError(ProviderFailed):
    """A call of a model failed. `retryable` says whether the same call may succeed a moment later."""

    code = "provider_unavailable"
    actor: ClassVar[Actor] = "provider"
    retryable: bool = False

    def __init__(
        self,
        message: str | None = None,
        *,
        details: dict[str, Any] | None = None,
        retry_after_s: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, details=details, retry_after_s=retry_after_s)
        if retryable is not None:
            self.retryable = retryable


class ProviderAuthFailed(ModelError):
    """The provider refused the configured key."""

    code = "provider_auth"
    message = "The model provider refused the configured key. An operator has to check it."
    actor = "operator"


class ProviderRateLimited(ModelError):
    """The provider wants fewer calls."""

    code = "provider_rate_limited"
    message = "The model provider is limiting our calls. Try again in a moment."
    retryable = True


class ProviderUnavailable(ModelError):
    """The provider cannot be reached, fails, or broke off."""

    code = "provider_unavailable"
    message = "The model provider is not available right now."
    retryable = True


class ProviderTimedOut(ModelError):
    """The provider was too slow. The message names which of the four limits was passed."""

    code = "provider_timeout"
    message = "The model provider took too long."
    retryable = True


class ModelNotFound(ModelError):
    """The provider does not know the configured model name. No code of the protocol is closer than unavailable."""

    code = "provider_unavailable"
    message = "The model provider does not know this model. An operator has to check its name."
    actor = "operator"


class RequestRefused(ModelError):
    """The provider refused the request itself, for example a parameter that the model does not support."""

    code = "provider_unavailable"
    message = "The model provider refused the request as it stands."
    actor = "operator"


class BadOutput(ModelError):
    """The provider sent something that cannot be read."""

    code = "bad_output"
    message = "The model sent something that could not be read."
    actor = "model"
    retryable = True


class ContentFiltered(ModelError):
    """The provider's content filter refused."""

    code = "content_filtered"
    message = "The model provider's content filter refused this conversation."
    actor = "caller"


class ReattachRefused(ModelError):
    """The provider no longer has the stream that was to be read on from."""

    code = "provider_unavailable"
    message = "The model provider no longer has the rest of this answer."


class ContextTooLong(ModelError):
    """The conversation does not fit into the model's context."""

    code = "context_too_long"
    message = "The conversation is too long for this model."
    actor = "caller"


class AddressRefused(ModelError):
    """The URL that a workspace has set for the provider must not be asked, or its answer not be taken."""

    code = "provider_unavailable"
    message = "The URL that is set for this provider cannot be used."
    actor = "caller"


class ProviderKeyNotFound(NotFound):
    """The workspace has no key for this provider."""

    message = "This workspace has no key for this provider."


class ProviderNotFound(NotFound):
    """The registry has no such provider, or workspaces may not have keys for it."""

    message = "There is no such provider that a workspace could have a key for."


class ProviderKeyInvalid(Invalid):
    """The key, or the URL that comes with it, cannot be taken."""


class UnknownModel(Invalid):
    """The request names a model that is not configured."""

    code = "unknown_model"
    message = "This model does not exist. GET /models lists those that do."


class ModelNotUsable(Unavailable):
    """The model is configured but cannot be called, for example because its key is missing."""

    code = "model_not_usable"
    message = "This model cannot be used right now."


class RegistryInvalid(Exception):
    """The model registry cannot be used. The text names the file, the line and what to do."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        self.path = path
        self.line = line
        self.message = message
        super().__init__(f"{path}, line {line}: {message}")


class PromptInvalid(Exception):
    """A prompt template cannot be used. The text names the file, the line and what is wrong."""

    def __init__(self, path: str, line: int | None, message: str) -> None:
        self.path = path
        self.line = line
        self.message = message
        super().__init__(f"{path}, line {line}: {message}" if line else f"{path}: {message}")


class ToolInvalid(Exception):
    """A tool cannot be offered to models. The text names it and says what is wrong."""

    def __init__(self, tool: str, message: str) -> None:
        self.tool = tool
        self.message = message
        super().__init__(f"the tool {tool or '(without a name)'}: {message}")
