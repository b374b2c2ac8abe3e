"""What can go wrong with who someone is."""

from parley.core.errors import Conflict, Forbidden, Invalid, NotFound, Unauthenticated, Unavailable


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


class UserUnknown(Unauthenticated):
    """A good token of another issuer, of somebody who has no account here and is not given one."""

    code = "user_unknown"
    message = "There is no account for this user."


class ApiKeyInvalid(Unauthenticated):
    """An API key that does not hold, for whatever reason: the caller is not told which."""

    code = "api_key_invalid"
    message = "The API key is not valid."


class ApiKeyExpired(Unauthenticated):
    """An API key that was good until its time came."""

    code = "api_key_expired"
    message = "The API key has expired."


class ApiKeyNotFound(NotFound):
    """No such key, or not the caller's."""

    code = "api_key_not_found"
    message = "No such API key."


class SessionNotFound(NotFound):
    """No such session, or not the caller's."""

    code = "session_not_found"
    message = "No such session."


class LinkInvalid(Invalid):
    """A token from a mail that does not exist, was used, is not the newest or has expired: one answer for all."""

    code = "link_invalid"
    message = "This link is not valid any more. Ask for a new one."


class PasswordWrong(Forbidden):
    """The current password is not right. Not 401: the credential of the request is good."""

    code = "invalid_credentials"
    message = "The current password is not right."


class PasswordMissing(Conflict):
    """The account signs in elsewhere and has no password here."""

    code = "no_password"
    message = "This account has no password."


class EmailUnverified(Forbidden):
    """The password is right, and the address has not been confirmed, which it must be here."""

    code = "email_unverified"
    message = "Confirm your e-mail address first. A link was sent to it."


class AccountDisabled(Forbidden):
    """The password is right, and an operator has closed the account."""

    code = "account_disabled"
    message = "This account is closed."


class CsrfRefused(Forbidden):
    """A request with or for a session's cookie that does not prove that our own page sent it."""

    code = "csrf_refused"
    message = "This request must come from the application itself."


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
