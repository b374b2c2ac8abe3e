from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.core.secrets import key_ring
from parley.identity.errors import RefreshInvalid
from parley.identity.refresh import RefreshTokens

OLD, BOTH, NEW = key_ring(("a",), "r"), key_ring(("b", "a"), "r"), key_ring(("b",), "r")
TOKENS = RefreshTokens(OLD)
SALT = b"s" * 16


def test_a_token_names_its_session_and_counter() -> None:
    session = uuid4()
    token = TOKENS.make(session, 7, salt=SALT)
    presented = TOKENS.parse(token)
    TOKENS.verify(presented, salt=SALT)
    assert token.startswith("parley_rt_")
    assert (presented.session_id, presented.counter) == (session, 7)


def test_the_same_token_can_be_made_again_and_no_other_equals_it() -> None:
    session = uuid4()
    made = {TOKENS.make(s, n, salt=salt) for s in (session, uuid4()) for n in (0, 1) for salt in (SALT, b"t" * 16)}
    assert len(made) == 8
    assert TOKENS.make(session, 0, salt=SALT) in made


def test_another_salt_or_key_is_refused() -> None:
    presented = TOKENS.parse(TOKENS.make(uuid4(), 0, salt=SALT))
    with pytest.raises(RefreshInvalid):
        TOKENS.verify(presented, salt=b"t" * 16)
    with pytest.raises(RefreshInvalid):
        RefreshTokens(NEW).verify(presented, salt=SALT)


def test_keys_rotate() -> None:
    session = uuid4()
    both = RefreshTokens(BOTH)
    both.verify(both.parse(TOKENS.make(session, 0, salt=SALT)), salt=SALT)
    RefreshTokens(NEW).verify(both.parse(both.make(session, 0, salt=SALT)), salt=SALT)


GOOD = TOKENS.make(uuid4(), 3, salt=SALT)


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.one_of(st.sampled_from("+/-_="), st.characters()))
def test_no_changed_character_survives(place: int, character: str) -> None:
    changed = GOOD[:place] + character + GOOD[place + 1 :]
    if changed == GOOD:
        return
    with pytest.raises(RefreshInvalid):
        TOKENS.verify(TOKENS.parse(changed), salt=SALT)


@settings(deadline=None)
@given(st.text() | st.binary(min_size=57, max_size=57).map(lambda raw: "parley_rt_" + raw.hex()[:76]))
def test_garbage_is_invalid(token: str) -> None:
    with pytest.raises(RefreshInvalid):
        TOKENS.verify(TOKENS.parse(token), salt=SALT)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "parley_rt_",
        GOOD[10:],
        GOOD + "=",
        GOOD[:-2] + "==",
        GOOD.replace("_rt_A", "_rt_B"),
        GOOD.replace("parley_rt_", "parley_ak_"),
        "x" * 86,
    ],
)
def test_malformed_tokens_are_invalid(token: str) -> None:
    with pytest.raises(RefreshInvalid):
        TOKENS.parse(token)
