"""What the API takes and shows of users and sessions."""

from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator
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


class SignUp(RequestModel):
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
    password: Password
    confirm_password: Annotated[Password, Field(validation_alias=AliasChoices("confirmPassword", "confirm_password"))]
    name: Name | None = None

    @field_validator("confirm_password")
    @classmethod
    def _same(cls, value: str, info: ValidationInfo) -> str:
        if "password" in info.data and info.data["password"] != value:
            raise PydanticCustomError("passwords_differ", "must be the same as password")
        return value


class SignIn(RequestModel):
    """An account's credentials."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"email": "ada@example.com", "password": "a long walk 1842"}]}
    )

    email: Email
    password: Password


class Refresh(RequestModel):
    """The newest refresh token of a session."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"refresh_token": _TOKEN}]})

    refresh_token: Annotated[RefreshToken, Field(repr=False)]


class SignOut(RequestModel):
    """A refresh token of the session to end; left out when the bearer token says which."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"refresh_token": _TOKEN}]})

    refresh_token: Annotated[RefreshToken | None, Field(repr=False)] = None


class UserUpdate(RequestModel):
    """What a user changes about themselves; null or nothing but spaces takes the name away."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Ada Lovelace"}]})

    name: Name | None


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


class TokenAnswer(ReadModel):
    """A session: who, where, and its two tokens. `expires_in` is the access token's life in seconds."""

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

    user: UserRead
    workspace: WorkspaceRead
    access_token: Annotated[str, Field(repr=False)]
    token_type: Literal["bearer"]
    expires_in: int
    refresh_token: Annotated[str, Field(repr=False)]
