"""Seals keys of providers: whoever has a copy of the database has none of them.

A sealed key is the name of our secret's key (4 bytes), a nonce (12 bytes) and the key under AES-256-GCM. What it is
bound to is authenticated with it: a row that was moved to another workspace or provider, or was given another URL by
hand, cannot be opened.
"""

import os
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from parley.core.secrets import KeyRing

PURPOSE: Final = "provider-key"
"""What the keys of the vault are derived for."""

_KID_BYTES: Final = 4
_NONCE_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class BoundTo:
    """What a key belongs to: a workspace, a provider of the registry, and where it may go."""

    workspace_id: UUID
    provider: str
    given_for: str
    own_url: bool

    @property
    def data(self) -> bytes:
        """The bytes that are authenticated. No provider's name and no URL holds a line feed."""
        kind = "own" if self.own_url else "operator"
        return "\n".join((str(self.workspace_id), self.provider, kind, self.given_for)).encode()


class Vault:
    """Seals with the first of the secrets, opens with all of them."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def seal(self, key: str, bound_to: BoundTo) -> bytes:
        """Return a key sealed. No two results are alike."""
        active = self._keys.active
        nonce = os.urandom(_NONCE_BYTES)
        return bytes.fromhex(active.kid) + nonce + AESGCM(active.value).encrypt(nonce, key.encode(), bound_to.data)

    def open(self, sealed: bytes, bound_to: BoundTo) -> SecretStr | None:
        """Return the key; None when its secret is no longer here, or when it is not bound to this."""
        secret = self._keys.find(sealed[:_KID_BYTES].hex())
        if secret is None:
            return None
        nonce, text = sealed[_KID_BYTES : _KID_BYTES + _NONCE_BYTES], sealed[_KID_BYTES + _NONCE_BYTES :]
        try:
            return SecretStr(AESGCM(secret.value).decrypt(nonce, text, bound_to.data).decode())
        except (InvalidTag, ValueError):
            return None

    def is_current(self, sealed: bytes) -> bool:
        """Whether a key is sealed with the secret that seals now."""
        return sealed[:_KID_BYTES].hex() == self._keys.active.kid
