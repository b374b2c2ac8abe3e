"""Issuers for tests: keys of their own, tokens as they make them, and a server for their JWKS."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET = "a secret that two services share, 32 bytes"
PARTY = "https://app.example.com"


def _b64(number: int) -> str:
    raw = number.to_bytes((number.bit_length() + 7) // 8)
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@dataclass
class SigningKey:
    """A key with its name."""

    algorithm: str
    kid: str
    private: Any

    @classmethod
    def make(cls, algorithm: str, kid: str = "key-1") -> "SigningKey":
        private: Any = {
            "RS256": lambda: rsa.generate_private_key(65537, 2048),
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
        }[algorithm]()
        return cls(algorithm, kid, private)

    @property
    def jwk(self) -> dict[str, Any]:
        about = {"kid": self.kid, "use": "sig", "alg": self.algorithm}
        public = self.private.public_key()
        if self.algorithm == "RS256":
            numbers = public.public_numbers()
            return {**about, "kty": "RSA", "n": _b64(numbers.n), "e": _b64(numbers.e)}
        if self.algorithm == "ES256":
            numbers = public.public_numbers()
            return {**about, "kty": "EC", "crv": "P-256", "x": _b64(numbers.x), "y": _b64(numbers.y)}
        raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
        return {**about, "kty": "OKP", "crv": "Ed25519", "x": x}

    @property
    def pem(self) -> bytes:
        pem: bytes = self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return pem

    @property
    def der(self) -> bytes:
        der: bytes = self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return der


@dataclass
class JwksServer:
    """Answers each request with `body`, as long as it is up; counts them."""

    keys: list[SigningKey]
    url: str = ""
    asked: int = 0
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    held: asyncio.Event | None = None
    """While it is set and not released, answers wait."""
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.asked += 1
                self.reached.set()
                if self.held is not None:
                    await self.held.wait()
                body = self.body if self.body is not None else json.dumps({"keys": [k.jwk for k in self.keys]}).encode()
                more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
                head = f"HTTP/1.1 {self.status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def jwks_server(*keys: SigningKey) -> AsyncIterator[JwksServer]:
    """Serve keys on a port of this machine."""
    made = JwksServer(list(keys))
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made.url = f"http://127.0.0.1:{port}/jwks.json"
    try:
        yield made
    finally:
        server.close()


@dataclass
class Made:
    """An issuer's entry, and how it signs."""

    name: str
    issuer: str | None
    algorithm: str
    entry: dict[str, Any]
    key: SigningKey | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def claims(self, subject: str = "user_1", **changes: Any) -> dict[str, Any]:
        """Return the claims of a good token; None takes one away."""
        now = int(time.time())
        made = {"sub": subject, "iat": now, "exp": now + 300, **self.extra}
        if self.issuer is not None:
            made["iss"] = self.issuer
        made |= changes
        return {name: value for name, value in made.items() if value is not None}

    def sign(self, claims: dict[str, Any], *, headers: dict[str, Any] | None = None) -> str:
        """Sign claims as this issuer does."""
        if self.key is None:
            return jwt.encode(claims, SECRET, algorithm="HS256", headers=headers)
        return jwt.encode(
            claims, self.key.private, algorithm=self.algorithm, headers={"kid": self.key.kid, **(headers or {})}
        )

    def token(self, subject: str = "user_1", **changes: Any) -> str:
        """Return a token."""
        return self.sign(self.claims(subject, **changes))


def clerk(url: str, key: SigningKey, **changes: Any) -> Made:
    """A Clerk-like one: RS256 by JWKS, `azp`, `sts`."""
    entry = {
        "name": "clerk", "issuer": "https://clerk.example.com", "algorithm": "RS256", "jwks_url": url,
        "azp": [PARTY], "create_users": True, "workspace": "personal", **changes,
    }  # fmt: skip
    return Made("clerk", entry["issuer"], "RS256", entry, key, {"azp": PARTY, "sts": "active", "v": 2})


def better_auth(url: str, key: SigningKey, **changes: Any) -> Made:
    """A Better-Auth-like one: EdDSA by JWKS, with an audience."""
    entry = {
        "name": "better", "issuer": "http://localhost:4000", "algorithm": "EdDSA", "jwks_url": url,
        "audience": "http://localhost:4000", "create_users": True, "workspace": "personal", **changes,
    }  # fmt: skip
    return Made("better", entry["issuer"], "EdDSA", entry, key, {"aud": "http://localhost:4000"})


def shared_secret(*, issuer: str | None, **changes: Any) -> Made:
    """One with a secret that both know; without an issuer for tokens that have no `iss`."""
    name = "plain" if issuer is None else "shared"
    entry = {
        "name": name, "issuer": issuer, "algorithm": "HS256", "secret_env": "SHARED_SECRET",
        "create_users": True, "workspace": "personal", **changes,
    }  # fmt: skip
    return Made(name, issuer, "HS256", entry)
