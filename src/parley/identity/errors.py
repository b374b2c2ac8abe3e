"""What can go wrong with who someone is."""

from parley.core.errors import Conflict, Forbidden, Invalid, Unauthenticated, Unavailable


class TokenInvalid(Unauthenticated):
    """An access token that does not hold, for whatever reason: the caller is not told which."""

    code = "token_invalid"
    message = "The access token is not valid."


class TokenExpired(Unauthenticated):
    """An access token that was good. Refreshing helps."""

    code = "token_expired"
    message = "The access token has expired."


class SessionRevoked(Unauthenticated):
    """The session was ended: by sign-out, by reuse of a refresh token, or with the membership."""

    code = "session_revoked"
    message = "The session has ended. Sign in again."


class SessionExpired(Unauthenticated):
    """The session reached its idle or its absolute limit."""

    code = "session_expired"
    message = "The session has expired. Sign in again."


class SessionUnknown(Unauthenticated):
    """A genuine refresh token that is ahead of the database, as after a restore from a backup."""

    code = "session_unknown"
    message = "The session is not known here. Sign in again."


class RefreshInvalid(Unauthenticated):
    """A refresh token that is malformed or not ours."""

    code = "refresh_invalid"
    message = "The refresh token is not valid."


class CredentialsInvalid(Unauthenticated):
    """Wrong password or unknown account: one answer for both."""

    code = "invalid_credentials"
    message = "The e-mail address or the password is not right."


class NoWorkspace(Forbidden):
    """The account is in no workspace any more."""

    code = "no_workspace"
    message = "This account belongs to no workspace."


class EmailTaken(Conflict):
    """There is an account with this e-mail address."""

    code = "email_taken"
    message = "There is already an account with this e-mail address."


class EmailInvalid(Invalid):
    """Not an e-mail address that we take."""

    message = "email must be an e-mail address"

    def __init__(self) -> None:
        super().__init__(details={"field": "email", "constraint": "email"})


class PasswordRefused(Invalid):
    """A password that breaks a rule. Never holds the password."""

    def __init__(self, message: str, *, constraint: str) -> None:
        super().__init__(f"password {message}", details={"field": "password", "constraint": constraint})


class PasswordsBusy(Unavailable):
    """More passwords are waiting to be hashed than the queue holds."""

    message = "Too many sign-ins at once. Try again in a moment."
