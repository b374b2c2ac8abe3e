"""Keys: every key derives from the secret key, so that one secret is kept and a list of them rotates."""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from parley.core.settings import Settings


@dataclass(frozen=True, slots=True)
class DerivedKey:
    """A 32-byte key for one purpose. `kid` names it without telling anything about it."""

    kid: str
    value: bytes

    @property
    def hex(self) -> str:
        """The key as text, for libraries that take a string."""
        return self.value.hex()


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of one purpose: the first one signs, all of them verify."""

    keys: tuple[DerivedKey, ...]

    @property
    def active(self) -> DerivedKey:
        """The key that signs."""
        return self.keys[0]

    def find(self, kid: str) -> DerivedKey | None:
        """Return the key of that name."""
        return next(
            (key for key in self.keys if hmac.compare_digest(key.kid.encode(), kid.encode("utf-8", "replace"))), None
        )


def derive(secret: str, purpose: str) -> DerivedKey:
    """Derive the key of a purpose (HKDF-SHA256 expand, RFC 5869, with the secret as input key material)."""
    extracted = hmac.new(b"parley", secret.encode(), hashlib.sha256).digest()
    value = hmac.new(extracted, purpose.encode() + b"\x01", hashlib.sha256).digest()
    return DerivedKey(kid=hashlib.sha256(b"kid:" + value).hexdigest()[:8], value=value)


def load_secrets(settings: Settings) -> tuple[str, ...]:
    """Return the secret keys; outside production one is made in the data directory (0600) when none is set."""
    if settings.secret_key:
        return tuple(key.get_secret_value() for key in settings.secret_key)
    path = settings.data_dir / "secret_key"
    try:
        return (path.read_text().strip(),)
    except FileNotFoundError:
        return (_make(path),)


def _make(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = secrets.token_urlsafe(48)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(made + "\n")
    try:
        # A link refuses to replace: of two processes that start at once, both end with the first one's secret.
        os.link(temporary, path)
    except FileExistsError:
        return path.read_text().strip()
    finally:
        temporary.unlink()
    return made


def key_ring(secrets_: tuple[str, ...], purpose: str) -> KeyRing:
    """Return the keys of a purpose, in the order of the secrets."""
    return KeyRing(tuple(derive(secret, purpose) for secret in secrets_))
