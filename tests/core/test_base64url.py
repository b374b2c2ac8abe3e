import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley.core import base64url


@given(st.binary(max_size=64))
def test_what_is_encoded_is_decoded(raw: bytes) -> None:
    text = base64url.encode(raw)
    assert base64url.decode(text) == raw
    assert not set(text) & set("+/ \n")


@pytest.mark.parametrize(
    "text", ["++++", "//__", "-+-+", "QQ", "QQ=", "QR==", "QUI", "QUJ=", "Q", "Q-é-", "QUJD\n", " QUJD", "=", "\ud800"]
)
def test_there_is_no_other_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        base64url.decode(text)


@given(st.binary(min_size=1, max_size=30), st.data())
def test_no_changed_text_is_decoded_to_the_same(raw: bytes, data: st.DataObject) -> None:
    text = base64url.encode(raw)
    place = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.one_of(st.sampled_from("+/-_= \n"), st.characters()))
    changed = text[:place] + character + text[place + 1 :]
    if changed == text:
        return
    with contextlib.suppress(ValueError):
        assert base64url.decode(changed) != raw
