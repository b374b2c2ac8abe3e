"""Keys of providers as they are stored: sealed, and bound to whom and what they are for."""

from dataclasses import replace
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley.core.secrets import key_ring
from parley.llm.provider_key_vault import PURPOSE, BoundTo, Vault

KEY = "sk-of-a-workspace-5d1c0b77"
HERE = BoundTo(uuid4(), "openai", "https://api.openai.com", own_url=False)


def vault(*secrets: str) -> Vault:
    return Vault(key_ring(secrets, PURPOSE))


def test_a_key_is_opened_by_whoever_has_the_secret() -> None:
    sealed = vault("one").seal(KEY, HERE)

    opened = vault("one").open(sealed, HERE)
    assert opened is not None
    assert opened.get_secret_value() == KEY
    assert KEY not in repr(opened)
    assert KEY.encode() not in sealed


def test_no_two_seals_are_alike() -> None:
    one = vault("one")

    assert len({one.seal(KEY, HERE) for _ in range(100)}) == 100


def test_a_list_of_secrets_rotates() -> None:
    sealed = vault("old").seal(KEY, HERE)
    both = vault("new", "old")

    opened = both.open(sealed, HERE)
    assert opened is not None
    assert opened.get_secret_value() == KEY
    assert not both.is_current(sealed)
    assert both.is_current(both.seal(KEY, HERE))
    assert vault("new").open(both.seal(KEY, HERE), HERE) is not None
    assert vault("new").open(sealed, HERE) is None


@pytest.mark.parametrize(
    "elsewhere",
    [
        replace(HERE, workspace_id=uuid4()),
        replace(HERE, provider="anthropic"),
        replace(HERE, given_for="https://evil.test"),
        replace(HERE, own_url=True),
    ],
)
def test_a_key_that_was_moved_is_not_opened(elsewhere: BoundTo) -> None:
    assert vault("one").open(vault("one").seal(KEY, HERE), elsewhere) is None


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_a_key_with_one_bit_changed_is_not_opened(place: int, bit: int) -> None:
    sealed = bytearray(vault("one").seal(KEY, HERE))
    sealed[place % len(sealed)] ^= 1 << bit

    assert vault("one").open(bytes(sealed), HERE) is None


@given(st.binary(max_size=64))
def test_what_was_never_sealed_is_not_opened(text: bytes) -> None:
    kid = bytes.fromhex(key_ring(("one",), PURPOSE).active.kid)

    assert vault("one").open(text, HERE) is None
    assert vault("one").open(kid + text, HERE) is None
