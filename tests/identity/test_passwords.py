import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import bcrypt
import pytest
from argon2 import PasswordHasher

from parley.core.settings import AuthSettings
from parley.identity.errors import PasswordRefused, PasswordsBusy
from parley.identity.passwords import Passwords

BCRYPT = bcrypt.hashpw(b"correct horse 1", bcrypt.gensalt(4)).decode()
EMAIL = "ada.lovelace42@example.com"


@pytest.fixture(scope="module")
def passwords() -> Iterator[Passwords]:
    made = Passwords(AuthSettings())
    yield made
    made.close()


@pytest.fixture(scope="module")
def bcrypt_passwords() -> Iterator[Passwords]:
    made = Passwords(AuthSettings(password_scheme="bcrypt"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "password",
    [
        "abcdefz1",
        "correct horse 1",
        " spaces kept 1 ",
        "пароль12",
        "密码密码密码密1",
        "🙂🙂🙂🙂🙂🙂a1",
        "aaaaaaa٣",  # an Arabic digit
        "a1" * 64,
        "é1" * 64,
    ],
)
def test_passwords_within_the_rules(passwords: Passwords, password: str) -> None:
    passwords.check(password, email=EMAIL)


@pytest.mark.parametrize(
    ("password", "constraint"),
    [
        ("", "min_length=8, max_length=128"),
        ("abcdef1", "min_length=8, max_length=128"),
        ("a" * 128 + "1", "min_length=8, max_length=128"),
        ("abcdefgh", "letter_and_digit"),
        ("12345678", "letter_and_digit"),
        ("!!!!!!!!", "letter_and_digit"),
        ("🙂🙂🙂🙂🙂🙂🙂1", "letter_and_digit"),
        ("abcdefg1\x00", "unstorable_text"),
        ("abcdefg1\ud800", "unstorable_text"),
        ("password1", "common"),
        ("PassWord1", "common"),
        ("12345678a", "common"),
        ("qwerty123", "common"),
        ("1q2w3e4r", "common"),
        ("parley2026", "common"),
        ("Ada.Lovelace42", "common"),
        (EMAIL, "common"),
    ],
)
def test_passwords_that_break_a_rule(passwords: Passwords, password: str, constraint: str) -> None:
    with pytest.raises(PasswordRefused) as caught:
        passwords.check(password, email=EMAIL)
    assert caught.value.details == {"field": "password", "constraint": constraint}
    assert not password or password not in caught.value.detail


def test_the_minimum_is_a_setting() -> None:
    passwords = Passwords(AuthSettings(password_min_length=15))
    with pytest.raises(PasswordRefused, match="between 15 and 128"):
        passwords.check("fourteen chars", email=EMAIL)
    passwords.check("fifteen chars 1", email=EMAIL)
    passwords.close()


async def test_new_hashes_are_argon2id_with_the_parameters_of_the_standard(passwords: Passwords) -> None:
    made = await passwords.hash("correct horse 1")
    assert made.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    verdict = await passwords.verify("correct horse 1", made)
    assert verdict.ok
    assert verdict.new_hash is None
    assert not (await passwords.verify("correct horse 2", made)).ok


@pytest.mark.parametrize("other", [" correct horse 1", "correct horse 1 ", "Correct horse 1", "correct horse 1\x00"])
async def test_every_byte_counts(passwords: Passwords, other: str) -> None:
    made = await passwords.hash("correct horse 1")
    assert not (await passwords.verify(other, made)).ok


async def test_nothing_is_normalised_nor_cut(passwords: Passwords) -> None:
    composed = await passwords.hash("\u00e9tude 12")
    assert not (await passwords.verify("e\u0301tude 12", composed)).ok
    long = "a1" * 63
    assert not (await passwords.verify(long + "cd", await passwords.hash(long + "ce"))).ok


async def test_a_bcrypt_hash_verifies_and_is_replaced(passwords: Passwords) -> None:
    stored = bcrypt.hashpw(b"correct horse 1", bcrypt.gensalt(4)).decode()
    verdict = await passwords.verify("correct horse 1", stored)
    assert verdict.ok
    assert verdict.new_hash is not None
    assert verdict.new_hash.startswith("$argon2id$")
    assert (await passwords.verify("wrong horse 1", stored)).new_hash is None


async def test_weaker_parameters_are_replaced(passwords: Passwords) -> None:
    weak = PasswordHasher(time_cost=1, memory_cost=512, parallelism=1).hash("correct horse 1")
    verdict = await passwords.verify("correct horse 1", weak)
    assert verdict.ok
    assert verdict.new_hash is not None
    assert "m=19456" in verdict.new_hash


async def test_bcrypt_is_a_setting(passwords: Passwords, bcrypt_passwords: Passwords) -> None:
    made = await bcrypt_passwords.hash("correct horse 1")
    assert made.startswith("$2b$12$")
    assert await bcrypt_passwords.verify("correct horse 1", made) == await bcrypt_passwords.verify(
        "correct horse 1", made
    )
    argon2 = await passwords.hash("correct horse 1")
    verdict = await bcrypt_passwords.verify("correct horse 1", argon2)
    assert verdict.ok
    assert verdict.new_hash is not None
    assert verdict.new_hash.startswith("$2b$12$")


async def test_bcrypt_refuses_what_it_would_cut(bcrypt_passwords: Passwords) -> None:
    bcrypt_passwords.check("é" * 35 + "a1", email=EMAIL)
    with pytest.raises(PasswordRefused) as caught:
        bcrypt_passwords.check("é" * 36 + "a1", email=EMAIL)
    assert caught.value.details["constraint"] == "max_bytes=72"
    stored = bcrypt.hashpw(b"a1" * 36, bcrypt.gensalt(4)).decode()
    assert not (await bcrypt_passwords.verify("a1" * 36 + "x", stored)).ok


@pytest.mark.parametrize("stored", ["", "x", "$argon2id$", "$2b$12$short", "$argon2id$v=19$m=1,t=1,p=1$x$y"])
async def test_a_stored_text_that_is_no_hash_matches_nothing(passwords: Passwords, stored: str) -> None:
    assert not (await passwords.verify("correct horse 1", stored)).ok


@pytest.mark.parametrize(
    ("password", "stored"),
    [
        ("correct horse 1", None),
        ("a1" * 64, None),
        ("a1" * 64, BCRYPT),
        ("x\x00", None),
        ("x", "no hash"),
    ],
)
async def test_a_refusal_costs_a_hash_of_the_current_kind(
    monkeypatch: pytest.MonkeyPatch, password: str, stored: str | None
) -> None:
    """An unknown account, and a password that the stored kind cannot take, are as slow as a wrong password."""
    passwords = Passwords(AuthSettings())
    hashed: list[str] = []

    def recorded(method: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
        def record(password: str, stored: str) -> Any:
            hashed.append(stored)
            return method(password, stored)

        return record

    for name in ("verify", "verify_and_update"):
        monkeypatch.setattr(passwords._context, name, recorded(getattr(passwords._context, name)))
    assert not (await passwords.verify(password, stored)).ok
    passwords.close()
    assert hashed[-1].startswith("$argon2id$v=19$m=19456,t=2,p=1$")


def blocked(passwords: Passwords) -> threading.Event:
    """Make hashing wait for the event."""
    free = threading.Event()
    original = passwords._context.hash

    def wait(password: str) -> str:
        free.wait(10)
        return original(password)

    passwords._context.hash = wait  # type: ignore[method-assign, assignment]  # holds the threads until the test lets go
    return free


async def test_the_queue_is_bounded_and_its_places_come_back() -> None:
    passwords = Passwords(AuthSettings(password_workers=1, password_queue=1))
    free = blocked(passwords)
    waiting = [asyncio.create_task(passwords.hash("correct horse 1")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(PasswordsBusy) as caught:
        await passwords.verify("correct horse 1", None)
    assert caught.value.retry_after_s
    # A caller that goes away while it waits gives its place back; one whose hash runs keeps it until the end.
    waiting[1].cancel()
    await asyncio.wait([waiting[1]])
    third = asyncio.create_task(passwords.hash("correct horse 1"))
    free.set()
    assert (await waiting[0]).startswith("$argon2id$")
    assert (await third).startswith("$argon2id$")
    passwords.close()


async def test_the_loop_runs_while_passwords_are_hashed() -> None:
    passwords = Passwords(AuthSettings(password_workers=1))
    free = blocked(passwords)
    waiting = asyncio.create_task(passwords.hash("correct horse 1"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    free.set()
    assert (await waiting).startswith("$argon2id$")
    passwords.close()


async def test_after_close_nothing_is_taken() -> None:
    passwords = Passwords(AuthSettings(password_workers=1, password_queue=1))
    passwords.close()
    for _ in range(3):
        with pytest.raises(PasswordsBusy):
            await passwords.hash("correct horse 1")
