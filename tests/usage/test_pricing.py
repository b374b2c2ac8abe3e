from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley.llm.ports import ImagePart, ModelMessage, ModelRequest, TextPart, UsageChunk
from parley.llm.registry import ModelEntry, Price
from parley.usage.bills import Estimate
from parley.usage.pricing import cost_of, images_of, input_tokens_of, worst_case

PRICES = {"input": "3", "cached_input": "0.3", "cache_write": "3.75", "output": "15", "image": "0.02"}


def priced(*, max_output_tokens: int = 4096, **price: str) -> ModelEntry:
    return ModelEntry(
        id="m", provider="p", kind="demo", name="n", price=Price.model_validate(price or PRICES),
        max_output_tokens=max_output_tokens,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("usage", "images", "cost"),
    [
        (UsageChunk(1_000_000, cache_written_tokens=400_000), 0, "3.3"),
        (UsageChunk(1_000_000, cached_tokens=500_000, cache_written_tokens=500_000), 0, "2.025"),
        # More than there was cannot have been cached.
        (UsageChunk(100, cached_tokens=80, cache_written_tokens=80), 0, "0.000099"),
        (UsageChunk(10, output_tokens=1), 3, "0.060045"),
    ],
)
def test_what_a_cache_and_images_cost(usage: UsageChunk, images: int, cost: str) -> None:
    assert cost_of(priced(), usage, images=images) == Decimal(cost)


_counts = st.integers(0, 10**6)


@given(_counts, _counts, _counts, st.integers(0, 4096), st.integers(0, 20))
def test_no_call_costs_more_than_the_worst_case(
    input_: int, cached: int, written: int, output: int, images: int
) -> None:
    entry = priced()
    used = UsageChunk(input_, cached, output, written)
    most = worst_case([entry], input_tokens=input_, output_tokens=4096, images=images)
    assert 0 <= cost_of(entry, used, images=images) <= most


def test_the_worst_case_is_that_of_the_dearest_model() -> None:
    cheap, dear = priced(input="1", output="1"), priced(input="2", output="0", max_output_tokens=10)
    assert worst_case([cheap, dear], input_tokens=1_000_000, output_tokens=0) == 2
    assert worst_case([cheap, dear], input_tokens=0, output_tokens=1_000_000) == Decimal("0.004096")
    assert worst_case([], input_tokens=1, output_tokens=1) == 0


def test_images_of_a_request_are_counted_apart() -> None:
    image = ImagePart("image/png", b"x")
    request = ModelRequest((ModelMessage("user", (image, TextPart("x" * 40), image)),))
    assert images_of(request) == 2
    assert input_tokens_of(request) == 10 + 2 * 1600
    assert Estimate.of_request([priced()], request).amount > Decimal("0.04")


def test_an_estimate_is_at_most_the_models_context() -> None:
    entry = priced(input="1", output="0")
    least = Estimate.of_bytes([entry], 0)
    assert 0 < least.input_tokens < Estimate.of_bytes([entry], 3000).input_tokens == least.input_tokens + 1000
    assert Estimate.of_bytes([entry], 10**9).input_tokens == entry.context
    assert Estimate.of_full_context([entry], images=1).input_tokens == entry.context
