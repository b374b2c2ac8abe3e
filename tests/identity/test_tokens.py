import base64
import hashlib
import hmac
import json
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.core import clock
from parley.core.errors import Unauthenticated
from parley.core.secrets import DerivedKey, KeyRing, key_ring
from parley.identity.errors import TokenExpired, TokenInvalid
from parley.identity.tokens import AccessTokens

RING = key_ring(("a" * 40,), "access-token")
LIFE = timedelta(minutes=15)


def make(ring: KeyRing = RING, *, issuer: str = "parley", audience: str = "parley-api") -> AccessTokens:
    return AccessTokens(ring, issuer=issuer, audience=audience, life=LIFE)


TOKENS = make()


def segment(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def header(**changes: Any) -> dict[str, Any]:
    found = {"alg": "HS256", "kid": RING.active.kid, "typ": "at+jwt", **changes}
    return {name: value for name, value in found.items() if value is not None}


def claims(**changes: Any) -> dict[str, Any]:
    now = int(clock.timestamp())
    found = {
        "iss": "parley",
        "aud": "parley-api",
        "sub": str(uuid4()),
        "wid": str(uuid4()),
        "sid": str(uuid4()),
        "iat": now,
        "exp": now + 900,
        "jti": "x",
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def sign_raw(head: bytes, body: bytes, *, key: bytes = RING.active.value, digest: str = "sha256") -> str:
    text = f"{segment(head)}.{segment(body)}"
    return f"{text}.{segment(hmac.new(key, text.encode(), digest).digest())}"


def sign(head: dict[str, Any], body: dict[str, Any], **options: Any) -> str:
    dumped = (json.dumps(part, separators=(",", ":"), sort_keys=True).encode() for part in (head, body))
    return sign_raw(*dumped, **options)


def test_an_issued_token_says_what_it_was_issued_for() -> None:
    user, workspace, session = uuid4(), uuid4(), uuid4()
    issued = TOKENS.issue(user, workspace, session)
    found = TOKENS.verify(issued.token)
    assert (found.user_id, found.workspace_id, found.session_id) == (user, workspace, session)
    assert issued.expires_in == 900
    assert found.expires_at == pytest.approx(clock.timestamp() + 900, abs=2)
    head, body, _ = (base64.urlsafe_b64decode(part + "==") for part in issued.token.split("."))
    assert json.loads(head) == {"alg": "HS256", "kid": RING.active.kid, "typ": "at+jwt"}
    assert set(json.loads(body)) == {"iss", "aud", "sub", "wid", "sid", "iat", "exp", "jti"}


def test_no_two_tokens_are_equal() -> None:
    ids = (uuid4(), uuid4(), uuid4())
    assert len({TOKENS.issue(*ids).token for _ in range(50)}) == 50


def test_a_token_signed_by_hand_is_taken() -> None:
    """Else the tables below would be green for any reason."""
    TOKENS.verify(sign(header(), claims()))


HEADERS = {
    "alg none": header(alg="none"),
    "alg None": header(alg="None"),
    "alg missing": header(alg=None),
    "alg is a number": header(alg=256),
    "alg is a list": header(alg=["HS256"]),
    "HS512": header(alg="HS512"),
    "RS256": header(alg="RS256"),
    "EdDSA": header(alg="EdDSA"),
    "dir": header(alg="dir"),
    "kid unknown": header(kid="ffffffff"),
    "kid missing": header(kid=None),
    "kid is a path": header(kid="../../dev/null"),
    "kid is a list": header(kid=[RING.active.kid]),
    "typ JWT": header(typ="JWT"),
    "typ missing": header(typ=None),
    "typ of a refresh token": header(typ="rt+jwt"),
    "jku": header(jku="http://127.0.0.1:9/keys"),
    "jwk": header(jwk={"kty": "oct", "k": segment(b"k" * 32)}),
    "x5u": header(x5u="http://127.0.0.1:9/cert"),
    "x5c": header(x5c=["AAAA"]),
    "crit": header(crit=["b64"], b64=False),
    "zip": header(zip="DEF"),
}


@pytest.mark.parametrize("head", HEADERS.values(), ids=HEADERS.keys())
@pytest.mark.parametrize("digest", ["sha256", "sha512"])
def test_a_header_that_is_not_exactly_ours_is_refused_even_when_signed_with_our_key(
    head: dict[str, Any], digest: str
) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(sign(head, claims(), digest=digest))


@pytest.mark.parametrize("key", [b"", b"x" * 32, RING.active.hex.encode(), RING.active.kid.encode(), b"a" * 40])
def test_another_key_is_refused(key: bytes) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(sign(header(), claims(), key=key))


def test_a_key_of_another_purpose_is_refused() -> None:
    other = key_ring(("a" * 40,), "refresh-token").active
    with pytest.raises(TokenInvalid):
        TOKENS.verify(sign(header(kid=other.kid), claims(), key=other.value))


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "wid", "sid", "iat", "exp"])
def test_each_claim_is_required(name: str) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(sign(header(), claims(**{name: None})))


@pytest.mark.parametrize("value", ["", "x", 1, 1.5, True, [], {}, "0193c0de", "\x00", "🙂" * 36, 10**400])
@pytest.mark.parametrize("name", ["iss", "aud", "sub", "wid", "sid"])
def test_claims_of_another_kind_are_refused(name: str, value: object) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(sign(header(), claims(**{name: value})))


@pytest.mark.parametrize("value", ["", "1999999999", 1e300, [], {}, -1, 0, 10**400, True])
@pytest.mark.parametrize("name", ["iat", "exp"])
def test_times_of_another_kind_never_make_a_token_good(name: str, value: object) -> None:
    body = claims(**{name: value})
    if name == "iat" and isinstance(value, int) and value < body["exp"]:
        TOKENS.verify(sign(header(), body))
    else:
        with pytest.raises(Unauthenticated):
            TOKENS.verify(sign(header(), body))


@pytest.mark.parametrize(
    "change", [{"iss": "someone"}, {"aud": "else"}, {"aud": ["parley-api"]}, {"aud": "parley-api "}]
)
def test_another_issuer_or_audience_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(sign(header(), claims(**change)))


def test_a_token_expires_to_the_second_by_our_clock() -> None:
    token = TOKENS.issue(uuid4(), uuid4(), uuid4()).token
    with clock.shifted(898):
        TOKENS.verify(token)
    with clock.shifted(900), pytest.raises(TokenExpired) as caught:
        TOKENS.verify(token)
    assert caught.value.code == "token_expired"


@pytest.mark.parametrize(("ahead_s", "good"), [(25, True), (60, False), (10**9, False)])
def test_a_token_from_the_future_is_refused_beyond_the_leeway(ahead_s: int, good: bool) -> None:
    now = int(clock.timestamp())
    token = sign(header(), claims(iat=now + ahead_s, exp=now + ahead_s + 900))
    if good:
        TOKENS.verify(token)
    else:
        with pytest.raises(TokenInvalid):
            TOKENS.verify(token)


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


GOOD = TOKENS.issue(uuid4(), uuid4(), uuid4()).token
HEAD, BODY, MAC = GOOD.split(".")

MALFORMED = {
    "empty": "",
    "dots": "..",
    "many dots": "." * 2000,
    "no signature": f"{HEAD}.{BODY}.",
    "two segments": f"{HEAD}.{BODY}",
    "four segments": f"{GOOD}.{MAC}",
    "only our header": HEAD,
    "another's body": f"{HEAD}.{segment(b'{}')}.{MAC}",
    "cut": GOOD[:-5],
    "header twice": f"{HEAD}.{HEAD}.{MAC}",
    "spaces": f" {GOOD}",
    "line break": f"{GOOD}\n",
    "NUL": "\x00" * 20,
    "NUL inside": GOOD.replace(".", "\x00."),
    "not ASCII": "ü" * 20,
    "emoji": "🙂.🙂.🙂",
    "lone surrogate": "\ud800.\udfff.\ud800",
    "100k characters": "A" * 100_000,
    "100k dots": "." * 100_000,
    "long body": f"{HEAD}.{'A' * 100_000}.{MAC}",
    "not base64": f"{HEAD}.%%%%.{MAC}",
    "deep header": sign_raw(deep(200_000), b"{}"),
    "deep body": sign_raw(json.dumps(header(), separators=(",", ":"), sort_keys=True).encode(), deep(700)),
    "body is a list": sign_raw(json.dumps(header(), separators=(",", ":"), sort_keys=True).encode(), b"[]"),
    "body is no JSON": sign_raw(json.dumps(header(), separators=(",", ":"), sort_keys=True).encode(), b"\xff\xfe{"),
    "body is empty": sign_raw(json.dumps(header(), separators=(",", ":"), sort_keys=True).encode(), b""),
    "NaN": sign_raw(json.dumps(header(), separators=(",", ":"), sort_keys=True).encode(), b'{"exp":NaN}'),
    "JWE": "a.b.c.d.e",
    "a refresh token": "parley_rt_" + "A" * 76,
    "a ticket": "tk_" + "A" * 64,
}


@pytest.mark.parametrize("token", MALFORMED.values(), ids=MALFORMED.keys())
def test_anything_malformed_is_invalid(token: str) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(token)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="AZaz09-_.=") | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_garbage_is_never_anything_but_invalid(token: str) -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.verify(token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["iss", "aud", "sub", "wid", "sid", "iat", "exp", "jti"]), JSON))
def test_signed_garbage_is_never_taken_nor_an_error(changes: dict[str, Any]) -> None:
    body = claims(sub=None) | {"sub": "not a uuid"} | changes
    with pytest.raises(Unauthenticated):
        TOKENS.verify(sign(header(), body))


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.characters(codec="ascii"))
def test_no_changed_character_survives_in_what_is_signed(place: int, character: str) -> None:
    changed = GOOD[:place] + character + GOOD[place + 1 :]
    if changed == GOOD or place > GOOD.rindex("."):
        return
    with pytest.raises(TokenInvalid):
        TOKENS.verify(changed)


def test_keys_rotate_without_a_refused_request() -> None:
    old, both, new = key_ring(("a" * 40,), "t"), key_ring(("b" * 40, "a" * 40), "t"), key_ring(("b" * 40,), "t")
    before = make(old).issue(uuid4(), uuid4(), uuid4()).token
    make(both).verify(before)
    after = make(both).issue(uuid4(), uuid4(), uuid4()).token
    make(both).verify(after)
    make(new).verify(after)
    with pytest.raises(TokenInvalid):
        make(new).verify(before)
    with pytest.raises(TokenInvalid):
        make(old).verify(after)


def test_a_short_key_is_not_used() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        make(KeyRing((DerivedKey("00000000", b"short"),)))


def test_the_body_is_ours_to_read_only_after_the_signature() -> None:
    """What a stranger wrote is not parsed: a body that would exhaust a parser fails on its signature."""
    token = sign_raw(b'{"alg":"HS256"}', deep(1000), key=hashlib.sha256(b"x").digest())
    with pytest.raises(TokenInvalid):
        TOKENS.verify(token)
