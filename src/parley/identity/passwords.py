"""Passwords: the rules for new ones, and hashing off the event loop in a bounded pool.

New hashes are argon2id (19 MiB, t=2, p=1: OWASP's first choice), or bcrypt 12 where the setting says so; either kind
verifies, and what is not of the current kind is replaced at the next sign-in. A password is hashed as its exact bytes.
"""

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from passlib.context import CryptContext
from passlib.exc import PasslibSecurityError, UnknownHashError

from parley.core.settings import AuthSettings
from parley.identity.common_passwords import COMMON_PASSWORDS
from parley.identity.errors import PasswordRefused, PasswordsBusy

MAX_LENGTH = 128
_BCRYPT_BYTES = 72
_RETRY_AFTER_S = 2
# Neither has bytes that every scheme takes.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a password was right, and the hash that should replace the stored one."""

    ok: bool
    new_hash: str | None = None


class Passwords:
    """Checks, hashes and verifies passwords. Owns its threads: `close` ends them."""

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings
        schemes = ["argon2", "bcrypt"]
        schemes.sort(key=lambda scheme: scheme != settings.password_scheme)
        self._context = CryptContext(
            schemes,
            deprecated="auto",
            argon2__type="ID",
            argon2__memory_cost=19456,
            argon2__time_cost=2,
            argon2__parallelism=1,
            bcrypt__rounds=12,
        )
        self._executor = ThreadPoolExecutor(settings.password_workers, thread_name_prefix="passwords")
        self._places = threading.BoundedSemaphore(settings.password_workers + settings.password_queue)
        # What an unknown account's password is compared with, so that it takes as long as a known one's.
        self._dummy_hash = self._context.hash("no account has this password")

    def check(self, password: str, *, email: str) -> None:
        """Raise `PasswordRefused` if a new password breaks a rule."""
        minimum = self._settings.password_min_length
        if not minimum <= len(password) <= MAX_LENGTH:
            bounds = f"min_length={minimum}, max_length={MAX_LENGTH}"
            raise PasswordRefused(f"must have between {minimum} and {MAX_LENGTH} characters", constraint=bounds)
        if not (any(c.isalpha() for c in password) and any(c.isdigit() for c in password)):
            raise PasswordRefused("must have at least one letter and one digit", constraint="letter_and_digit")
        if _UNSTORABLE.search(password):
            raise PasswordRefused("must not contain NUL or unpaired surrogates", constraint="unstorable_text")
        if self._context.default_scheme() == "bcrypt" and len(password.encode()) > _BCRYPT_BYTES:
            raise PasswordRefused(f"must have at most {_BCRYPT_BYTES} bytes", constraint=f"max_bytes={_BCRYPT_BYTES}")
        folded = password.casefold()
        address = email.casefold()
        if folded in COMMON_PASSWORDS or folded in {address, address.rpartition("@")[0]}:
            raise PasswordRefused("is too easy to guess", constraint="common")

    async def hash(self, password: str) -> str:
        """Return the hash of a new password. Raises `PasswordsBusy`."""
        return await self._run(lambda: self._context.hash(password))

    async def verify(self, password: str, hash: str | None) -> Verdict:
        """Compare a password with a hash; None stands for an account that does not exist. Raises `PasswordsBusy`."""
        return await self._run(lambda: self._verify(password, hash))

    def close(self) -> None:
        """End the threads; what still waits is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _verify(self, password: str, hash: str | None) -> Verdict:
        try:
            ok, new_hash = self._context.verify_and_update(password, hash or self._dummy_hash)
        except (PasslibSecurityError, UnknownHashError, ValueError):
            # A password that bcrypt cannot take (over 72 bytes, NUL), or a hash that is none. As slow as any other.
            self._context.verify("", self._dummy_hash)
            return Verdict(ok=False)
        return Verdict(ok=ok, new_hash=new_hash) if hash is not None else Verdict(ok=False)

    async def _run[T](self, work: Callable[[], T]) -> T:
        if not self._places.acquire(blocking=False):
            raise PasswordsBusy(retry_after_s=_RETRY_AFTER_S)
        try:
            future = self._executor.submit(work)
        except RuntimeError:
            self._places.release()
            raise PasswordsBusy(retry_after_s=_RETRY_AFTER_S) from None
        # The place is free when the thread is, not when the caller has gone.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)
