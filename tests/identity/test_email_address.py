import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.identity.email_address import parse
from parley.identity.errors import EmailInvalid


@pytest.mark.parametrize(
    ("email", "folded"),
    [
        ("ada@example.com", "ada@example.com"),
        ("  Ada@Example.COM\n", "ada@example.com"),
        ("ada+tag@mail.example.co.uk", "ada+tag@mail.example.co.uk"),
        ("o'brien@example.com", "o'brien@example.com"),
        ("jörg@müller.de", "jörg@müller.de"),
        ("JÖRG@Müller.de", "jörg@müller.de"),
        ("Straße@example.com", "strasse@example.com"),
        ("\uff41da@example.com", "ada@example.com"),  # a full-width a
        ("x@1.example", "x@1.example"),
        ("a" * 64 + "@example.com", "a" * 64 + "@example.com"),
    ],
)
def test_addresses_are_kept_as_given_and_folded(email: str, folded: str) -> None:
    assert parse(email) == (email.strip(), folded)


@pytest.mark.parametrize(
    "email",
    [
        "", " ", "ada", "@", "@example.com", "ada@", "ada@example", "ada@.com", "ada@example..com", "ada@example.com.",
        "ada@@example.com", "a@b@example.com", "ada lovelace@example.com", "ada@exam ple.com", "ada@-example.com",
        "ada@example-.com", "ada@example_x.com", "ada\x00@example.com", "ada\u202e@example.com",
        "ada\ud800@example.com",
        "ada\uff20example.com", "a\uff20b@example.com", "<ada@example.com>", "ada@example.com,bob@example.com",
        '"ada"@example.com', "ada@[127.0.0.1]", "ada@example.com\r\nBcc: x@example.com", ".ada@example.com",
        "ada.@example.com", "a..da@example.com", "a" * 65 + "@example.com", "a@" + "b" * 64 + ".com",
        "a@" + "b." * 130 + "com", "x" * 100_000, "\ufdfa" * 60 + "@example.com", "ada@example.com;x",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_repeating_it(email: str) -> None:
    with pytest.raises(EmailInvalid) as caught:
        parse(email)
    assert caught.value.details == {"field": "email", "constraint": "email"}
    assert caught.value.detail == "email must be an e-mail address"


@settings(deadline=None)
@given(st.text(), st.text())
def test_folding_is_stable_and_fits_the_column(local: str, domain: str) -> None:
    try:
        given_form, folded = parse(f"{local}@{domain}.com")
    except EmailInvalid:
        return
    assert parse(folded)[1] == folded
    assert parse(given_form.upper().lower())[1] == parse(given_form.lower())[1]
    assert max(len(given_form), len(folded)) <= 320
