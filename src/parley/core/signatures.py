"""AWS Signature Version 4, as S3-compatible stores want it: what is signed, and how (AWS's own description)."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs requests to one region of one service."""

    access_key: str
    secret_key: str = field(repr=False)
    region: str
    service: str = "s3"

    def headers(
        self, method: str, path: str, *, host: str, sha256: str, now: datetime, query: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Return the headers that sign a request. `path` is already quoted; `sha256` is of the body, as hex."""
        moment = now.strftime("%Y%m%dT%H%M%SZ")
        signed = {"host": host, "x-amz-content-sha256": sha256, "x-amz-date": moment}
        names = ";".join(signed)
        canonical = "\n".join(
            [
                method,
                path,
                "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted((query or {}).items())),
                *(f"{name}:{value}" for name, value in signed.items()),
                "",
                names,
                sha256,
            ]
        )
        scope = f"{moment[:8]}/{self.region}/{self.service}/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{self.secret_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        return {
            "x-amz-content-sha256": sha256,
            "x-amz-date": moment,
            "authorization": f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}",
        }
