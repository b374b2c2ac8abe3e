"""What the API takes and shows of users and sessions."""

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from parley.core.schemas import ReadModel, RequestModel, Text
from parley.identity.passwords import MAX_LENGTH as PASSWORD_LENGTH
from parley.tenancy.schemas import WorkspaceRead

# Left out of `repr`, so that no log and no traceback holds one.
Password = Annotated[Text, Field(max_length=PASSWORD_LENGTH, repr=False)]
Email = Annotated[Text, Field(max_length=320)]
Name = Annotated[
    Text, StringConstraints(strip_whitespace=True, max_length=200), AfterValidator(lambda name: name or None)
]
RefreshToken = Annotated[Text, Field(max_length=512)]

_TOKEN = "parley_rt_AZ8xQ0Ib…"  # noqa: S105 - an example
_USER: JsonDict = {
    "id": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
    "email": "ada@example.com",
    "name": "Ada",
    "email_verified": False,
}
_WORKSPACE: JsonDict = {"id": "0193c0de-9f3a-7bd2-8000-2b1d4a5c6e7f", "name": "Ada's workspace", "role": "owner"}


class _NewPassword(RequestModel):
    password: Password
    confirm_password: Annotated[Password, Field(validation_alias=AliasChoices("confirmPassword", "confirm_password"))]

    @field_validator("confirm_password")
    @classmethod
    def _same(cls, value: str, info: ValidationInfo) -> str:
        if "password" in info.data and info.data["password"] != value:
            raise PydanticCustomError("passwords_differ", "must be the same as password")
        return value


class SignUp(_NewPassword):
    """A new account. The password: at least 8 characters with a letter and a digit, and not a common one."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "email": "ada@example.com",
                    "password": "a long walk 1842",
                    "confirmPassword": "a long walk 1842",
                    "name": "Ada",
                }
            ]
        }
    )

    email: Email
    name: Name | None = None


class SignIn(RequestModel):
    """An account's credentials."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"email": "ada@example.com", "password": "a long walk 1842"}]}
    )

    email: Email
    password: Password
    restore: Annotated[StrictBool, Field(description="Bring the account back if it is being deleted")] = False


class Refresh(RequestModel):
    """The newest refresh token of a session; left out when it is in the session's cookie."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"refresh_token": _TOKEN}]})

    refresh_token: Annotated[RefreshToken | None, Field(repr=False)] = None


class SignOut(RequestModel):
    """A refresh token of the session to end; left out when the bearer token says which."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"refresh_token": _TOKEN}]})

    refresh_token: Annotated[RefreshToken | None, Field(repr=False)] = None


class UserUpdate(RequestModel):
    """What a user changes about themselves; what is left out stays.

    A name of null or nothing but spaces is taken away. A new address counts once it is confirmed, and is asked for
    with the current password.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Ada Lovelace"}]})

    name: Name | None = None
    email: Email | None = None
    current_password: Annotated[Text | None, Field(max_length=PASSWORD_LENGTH, repr=False)] = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set & {"name", "email"}:
            raise PydanticCustomError("nothing_to_change", "name or email is needed")
        if self.email is not None and self.current_password is None:
            raise PydanticCustomError("password_needed", "current_password is needed to change the address")
        return self


class Switch(RequestModel):
    """Where the session goes on: a workspace that the caller is a member of."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"workspace_id": _WORKSPACE["id"]}]})

    workspace_id: UUID


class PasswordChange(_NewPassword):
    """A new password, and the one that it replaces."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "current_password": "a long walk 1842",
                    "password": "a longer walk 1843",
                    "confirmPassword": "a longer walk 1843",
                }
            ]
        }
    )

    current_password: Password


class PasswordReset(_NewPassword):
    """A new password, and the token from the mail."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "token": "parley_ot_AZ8xQ0Ib…",
                    "password": "a longer walk 1843",
                    "confirmPassword": "a longer walk 1843",
                }
            ]
        }
    )

    token: Annotated[Text, Field(max_length=512, repr=False)]


class EmailToken(RequestModel):
    """The token from a mail."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token": "parley_ot_AZ8xQ0Ib…"}]})

    token: Annotated[Text, Field(max_length=512, repr=False)]


class EmailOnly(RequestModel):
    """An address to write to, if it has an account."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"email": "ada@example.com"}]})

    email: Email


class Accepted(ReadModel):
    """What was asked for is under way; the answer is the same whether or not there is an account."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "accepted"}]})

    status: Literal["accepted"]


class UserRead(ReadModel):
    """A user."""

    model_config = ConfigDict(json_schema_extra={"examples": [_USER]})

    id: UUID
    email: str | None
    name: str | None
    email_verified: bool


class MeRead(UserRead):
    """The caller, and the workspace that the credential is for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**_USER, "workspace": _WORKSPACE}]})

    workspace: WorkspaceRead


class _Tokens(ReadModel):
    user: UserRead
    workspace: WorkspaceRead
    access_token: Annotated[str, Field(repr=False)]
    token_type: Literal["bearer"]
    expires_in: int


class TokenAnswer(_Tokens):
    """A session as it is issued, with both of its tokens."""

    refresh_token: Annotated[str, Field(repr=False)]


class SessionAnswer(_Tokens):
    """A session: who, where, and its tokens. `expires_in` is the access token's life in seconds.

    In cookie mode `refresh_token` is null: the cookie has it.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user": _USER,
                    "workspace": _WORKSPACE,
                    "access_token": "eyJhbGciOiJIUzI1NiIs…",
                    "token_type": "bearer",
                    "expires_in": 900,
                    "refresh_token": _TOKEN,
                }
            ]
        }
    )

    refresh_token: Annotated[str | None, Field(repr=False)]


class SessionRead(ReadModel):
    """A session that holds: one sign-in on one device."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "0193c0de-9f3a-7bd2-8000-4d3c2b1a0f9e",
                    "device": "Firefox on Linux",
                    "user_agent": "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0",
                    "address": "203.0.113.7",
                    "cookie": True,
                    "created_at": "2026-11-20T08:00:00Z",
                    "last_used_at": "2026-11-21T09:30:00Z",
                    "expires_at": "2026-11-28T09:30:00Z",
                    "current": True,
                    "workspace": _WORKSPACE,
                }
            ]
        }
    )

    id: UUID
    device: str
    user_agent: str | None
    address: str | None
    cookie: bool
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool
    workspace: WorkspaceRead | None


class AccountDelete(RequestModel):
    """How the end of an account is confirmed: by its password, or where there is none by its e-mail address or id."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"current_password": "a long walk 1842"}]})

    # Its own field and not `Password`, whose `repr=False` has no effect inside a union.
    current_password: Annotated[Text | None, Field(max_length=PASSWORD_LENGTH, repr=False)] = None
    confirm: Annotated[Text, Field(max_length=320)] | None = None


class ErasureRead(ReadModel):
    """Until when a closed account can be restored."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"erase_after": "2026-11-28T09:30:00Z"}]})

    erase_after: datetime


class StartedJob(ReadModel):
    """A job that was just added."""

    id: UUID
    kind: str
    status: Literal["queued"] = "queued"


class ExportStarted(ReadModel):
    """The job that packs an export; its result has `export_id` and `expires_at`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"job": {"id": "0193c0de-9f3a-7bd2-8000-3c2d1e0f4a5b", "kind": "export", "status": "queued"}}]
        }
    )

    job: StartedJob
