"""Who the checks are made as: the account that was given, or one that is signed up for this and closed afterwards."""

import asyncio
import secrets
from dataclasses import dataclass, field

import httpx

from parley.conformance.errors import CannotStart, Skipped


@dataclass
class Account:
    """Somebody with a token. `password` is known of those that were signed up or signed in here."""

    token: str = field(repr=False)
    email: str | None = None
    password: str | None = field(default=None, repr=False)
    is_ours: bool = False


class People:
    """The first account, and the second one once a check needs it."""

    def __init__(self, http: httpx.AsyncClient, first: Account, *, second: tuple[str, str] | None) -> None:
        self._http = http
        self.first = first
        self._second: Account | None = None
        self._second_given = second
        self._why_not: str | None = None
        self._lock = asyncio.Lock()

    @classmethod
    async def find(
        cls, http: httpx.AsyncClient, *, token: str | None, given: tuple[str, str] | None,
        second: tuple[str, str] | None,
    ) -> "People":  # fmt: skip
        """Sign in, or up. Raises `CannotStart`."""
        if token is not None:
            first = Account(token)
        elif given is not None:
            first = await sign_in(http, *given)
        else:
            first = await sign_up(http)
        return cls(http, first, second=second)

    async def second(self) -> Account:
        """Return the second account, in another workspace. Raises `Skipped` where there is none to be had."""
        async with self._lock:
            if self._second is None and self._why_not is None:
                try:
                    given = self._second_given
                    self._second = await sign_in(self._http, *given) if given else await sign_up(self._http)
                except CannotStart as problem:
                    self._why_not = str(problem)
            if self._second is None:
                raise Skipped(f"a second account is needed: {self._why_not}")
            return self._second

    async def session(self, of: Account) -> Account:
        """Return the same account in a session of its own. Raises `Skipped` where its password is not known."""
        if of.email is None or of.password is None:
            raise Skipped("a session of its own is needed: give --email and --password instead of a token")
        return await sign_in(self._http, of.email, of.password)

    async def leave(self) -> list[str]:
        """Close the accounts and the sessions that were made here. Returns what could not be closed."""
        left = []
        for account in filter(None, (self.first, self._second)):
            if not account.is_ours:
                if account.password is not None:
                    headers = {"Authorization": f"Bearer {account.token}"}
                    await self._http.post("/api/v1/auth/signout", json={}, headers=headers)
                continue
            response = await self._http.request(
                "DELETE", "/api/v1/me", json={"current_password": account.password},
                headers={"Authorization": f"Bearer {account.token}"},
            )  # fmt: skip
            if response.status_code >= 400:
                left.append(str(account.email))
        return left


async def sign_up(http: httpx.AsyncClient) -> Account:
    """Make an account. Raises `CannotStart`."""
    email, password = f"conformance-{secrets.token_hex(6)}@example.com", f"Parley-{secrets.token_hex(12)}-1"
    body = {"email": email, "password": password, "confirmPassword": password, "name": "Conformance"}
    response = await http.post("/api/v1/auth/signup", json=body)
    if response.status_code != 201:
        raise CannotStart(
            f"no account could be signed up (the server answered {response.status_code}): "
            "give --email and --password, or --token"
        )
    return Account(response.json()["data"]["access_token"], email, password, is_ours=True)


async def sign_in(http: httpx.AsyncClient, email: str, password: str) -> Account:
    """Sign in. Raises `CannotStart`."""
    response = await http.post("/api/v1/auth/signin", json={"email": email, "password": password})
    if response.status_code != 200:
        raise CannotStart(f"{email} could not be signed in: the server answered {response.status_code}")
    return Account(response.json()["data"]["access_token"], email, password)
