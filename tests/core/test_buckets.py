"""The client of an S3-compatible store, against one that checks every signature, and Amazon's own examples."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from hashlib import sha256

import httpx
import pytest
from pydantic import SecretStr

from parley.core.buckets import Bucket, ObjectMissing, StoreUnavailable
from parley.core.http import create_http_client
from parley.core.settings import AttachmentSettings
from parley.core.signatures import EMPTY_SHA256, Signer
from tests.bucket_server import ACCESS_KEY, BUCKET, REGION, SECRET_KEY, Asked, BucketServer


@pytest.fixture
async def server() -> AsyncIterator[BucketServer]:
    async with BucketServer() as made:
        yield made


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with create_http_client() as made:
        yield made


def settings_of(server: BucketServer, *, secret: str = SECRET_KEY, prefix: str = "") -> AttachmentSettings:
    return AttachmentSettings(
        store="s3", s3_endpoint=server.url, s3_bucket=BUCKET, s3_region=REGION, s3_access_key=ACCESS_KEY,
        s3_secret_key=SecretStr(secret), s3_prefix=prefix,
    )  # fmt: skip


@pytest.fixture
def bucket(http: httpx.AsyncClient, server: BucketServer) -> Bucket:
    return Bucket(http, settings_of(server))


async def put(bucket: Bucket, key: str, data: bytes) -> None:
    def pieces() -> Iterator[bytes]:
        yield from (data[at : at + 100_000] for at in range(0, len(data), 100_000))

    await bucket.put(key, pieces, size=len(data), sha256=sha256(data).hexdigest(), media_type="image/png")


async def test_an_object_comes_back_as_it_was(bucket: Bucket, server: BucketServer) -> None:
    data = bytes(range(256)) * 2000
    await put(bucket, "workspaces/a/b", data)
    assert server.objects == {"workspaces/a/b": data}
    assert server.asked[0].headers["content-type"] == "image/png"
    assert server.asked[0].headers["content-length"] == str(len(data))
    assert "transfer-encoding" not in server.asked[0].headers
    assert b"".join([piece async for piece in bucket.get("workspaces/a/b")]) == data
    await bucket.delete("workspaces/a/b")
    assert server.objects == {}


async def test_keys_stand_below_the_prefix(http: httpx.AsyncClient, server: BucketServer) -> None:
    await put(Bucket(http, settings_of(server, prefix="parley one/é/")), "x", b"1")
    assert server.objects == {"parley one/é/x": b"1"}


async def test_what_is_not_there_is_missing_and_can_be_removed(bucket: Bucket) -> None:
    with pytest.raises(ObjectMissing):
        async for _ in bucket.get("nothing"):
            pass
    await bucket.delete("nothing")


async def test_a_wrong_key_is_told_without_the_stores_words(
    http: httpx.AsyncClient, server: BucketServer, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(http, settings_of(server, secret="another"))
    with pytest.raises(StoreUnavailable):
        await put(bucket, "x", b"1")
    assert server.objects == {}
    assert len(server.asked) == 1
    assert "the store refused a request" in caplog.text
    assert "Signature" not in caplog.text


async def test_a_busy_store_is_asked_again_with_the_whole_body(bucket: Bucket, server: BucketServer) -> None:
    server.refuse = lambda asked: 503 if len(server.asked) < 3 else None
    await put(bucket, "x", b"a" * 300_000)
    assert server.objects["x"] == b"a" * 300_000
    assert [asked.status for asked in server.asked] == [503, 503, 200]


async def test_a_store_that_stays_busy_is_unavailable(bucket: Bucket, server: BucketServer) -> None:
    server.refuse = lambda _: 500
    with pytest.raises(StoreUnavailable):
        await put(bucket, "x", b"1")
    assert len(server.asked) == 3


async def test_a_store_that_is_away_is_unavailable(http: httpx.AsyncClient) -> None:
    async with BucketServer() as server:
        settings = settings_of(server)
    with pytest.raises(StoreUnavailable):
        await Bucket(http, settings).delete("x")


async def test_the_test_store_notices_a_changed_request(bucket: Bucket, server: BucketServer) -> None:
    """What the other tests rely on: each part of a request is under the signature."""
    from tests.bucket_server import _problem

    await put(bucket, "x", b"1")
    asked, now = server.asked[0], datetime.now(UTC)
    assert _problem(asked, now) is None
    for changed in (
        Asked("DELETE", asked.path, asked.headers, asked.body),
        Asked("PUT", asked.path + "y", asked.headers, asked.body),
        Asked("PUT", asked.path, asked.headers, b"2"),
        Asked("PUT", asked.path, {**asked.headers, "host": "elsewhere"}, asked.body),
        Asked("PUT", asked.path, {**asked.headers, "x-amz-date": "20200101T000000Z"}, asked.body),
        Asked("PUT", asked.path, {**asked.headers, "authorization": ""}, asked.body),
    ):
        assert _problem(changed, now) is not None


# From Amazon's documentation of the signature: "Authenticating Requests: Using the Authorization Header", its examples
# without additional headers.
@pytest.mark.parametrize(
    ("query", "signature"),
    [
        ({"lifecycle": ""}, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ({"max-keys": "2", "prefix": "J"}, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_amazons_examples(query: dict[str, str], signature: str) -> None:
    signer = Signer("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
    headers = signer.headers(
        "GET", "/", host="examplebucket.s3.amazonaws.com", sha256=EMPTY_SHA256, query=query,
        now=datetime(2013, 5, 24, tzinfo=UTC),
    )  # fmt: skip
    assert headers["authorization"].endswith(f"Signature={signature}")


@pytest.mark.parametrize(
    "endpoint", ["s3.example.com", "ftp://s3.example.com", "https://s3.example.com/path", "https://"]
)
def test_an_endpoint_is_a_scheme_and_a_host(endpoint: str) -> None:
    with pytest.raises(ValueError, match="S3_ENDPOINT"):
        AttachmentSettings(s3_endpoint=endpoint)


def test_the_store_has_to_be_whole() -> None:
    with pytest.raises(ValueError, match="S3_BUCKET"):
        AttachmentSettings(store="s3", s3_endpoint="https://s3.example.com")
