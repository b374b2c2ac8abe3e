"""Objects from models: given a schema or told of it, asked again when it is no such object, and counted each time."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from benchmarks.fake_provider import FakeProvider
from parley.core.scope import Scope
from parley.core.settings import LlmSettings, Settings
from parley.llm.errors import ContentFiltered, ModelError, UnknownModel
from parley.llm.ports import ModelMessage, ModelRequest, TextPart, ToolSpec
from parley.llm.prompts import PromptLibrary
from parley.usage.errors import OverBudget
from parley.usage.ledger import Purpose
from parley.usage.service import UsageService
from parley.usage.structured import StructuredOutputInvalid, structured
from tests.chat.books import Books, set_budgets, workspace_budget
from tests.conftest import Account, make_settings
from tests.llm.calls import asking

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key, flavour: openai}}
  claude: {{kind: anthropic, base_url: "{url}", api_key: test-key}}
  background: {{kind: openai_responses, base_url: "{url}/v1", api_key: test-key}}
  gone: {{kind: openai, base_url: "{url}/gone", api_key: test-key}}
  demo: {{kind: demo}}
models:
  gpt: {{provider: openai, name: fake, retries: 0, price: &price {{input: 1, output: 10}}, capabilities: &can [json_schema]}}
  plain: {{provider: openai, name: fake, retries: 0, price: *price}}
  claude: {{provider: claude, name: fake, retries: 0, price: *price, capabilities: *can}}
  background: {{provider: background, name: fake, retries: 0, price: *price, capabilities: *can}}
  falls: {{provider: gone, name: fake, retries: 0, price: *price, capabilities: *can, fallbacks: [plain]}}
  demo: {{provider: demo, name: demo, parameters: {{delay_ms: 0}}, capabilities: *can}}
aliases:
  default: [gpt]
"""


class Mark(BaseModel):
    """A mark for an answer."""

    points: int = Field(ge=0, le=5)
    why: str


class Tree(BaseModel):
    """What Anthropic's strict form cannot say."""

    name: str
    children: list["Tree"] = []


GOOD = '{"points":3,"why":"clear"}'
WRONG = '{"points":9,"why":"too_good"}'
MARK = Mark(points=3, why="clear")


@pytest.fixture
def settings(tmp_path: Path, urls: Any, provider: FakeProvider) -> Settings:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return make_settings(tmp_path, urls, llm=LlmSettings(registry=path))


@pytest.fixture
def prompts(app: FastAPI) -> PromptLibrary:
    found: PromptLibrary = app.state.prompts
    return found


def bodies(provider: FakeProvider) -> list[dict[str, Any]]:
    return [record.body for record in provider.requests]


@pytest.mark.parametrize("model", ["gpt", "plain", "claude", "background", "falls"])
async def test_the_first_answer_is_enough(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider, model: str, books: Books
) -> None:
    found = await structured(usage, scope, asking(f"answers={GOOD}"), Mark, model, prompts=prompts)
    assert found == MARK
    body = bodies(provider)[-1]
    form = {key for key in ("response_format", "output_config", "text") if key in body}
    told = "JSON schema:" in str(body)
    assert (len(form), told) == ((0, True) if model in {"plain", "falls"} else (1, False))
    entries = await books.entries()
    assert entries[-1]["purpose"] == "structured"
    served = provider.served()
    assert served.calls == 1
    assert (sum(entry["input_tokens"] for entry in entries), entries[-1]["output_tokens"]) == (
        served.input_tokens, served.output_tokens,
    )  # fmt: skip


async def test_the_demo_model_needs_no_key(usage: UsageService, prompts: PromptLibrary, scope: Scope) -> None:
    found = await structured(usage, scope, asking("mark this"), Mark, "demo", prompts=prompts)
    assert found == Mark(points=0, why="demo")
    assert await structured(usage, scope, asking("mark this"), Tree, "demo", prompts=prompts) == Tree(name="demo")


async def test_a_schema_that_the_provider_cannot_say_is_told_in_words_too(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider
) -> None:
    await structured(usage, scope, asking('answers={"name":"a"}'), Tree, "claude", prompts=prompts)
    assert "JSON schema:" in bodies(provider)[-1]["system"]


@pytest.mark.parametrize("bad", [WRONG, "{points:", "Sorry,I_cannot.", '```json\\n{"points":1}```'])
async def test_what_is_wrong_is_sent_back(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider, bad: str, books: Books
) -> None:
    assert await structured(usage, scope, asking(f"answers={bad}|{GOOD}"), Mark, prompts=prompts) == MARK
    first, second = bodies(provider)
    assert second["messages"][: len(first["messages"])] == first["messages"]
    said, told = second["messages"][len(first["messages"]) :]
    assert (said["role"], said["content"], told["role"]) == ("assistant", bad, "user")
    if bad is WRONG:
        assert "points: Input should be less than or equal to 5" in told["content"]
    entries = await books.entries()
    assert [entry["purpose"] for entry in entries] == ["structured"] * 2
    served = provider.served()
    assert (sum(entry["input_tokens"] for entry in entries), sum(entry["output_tokens"] for entry in entries)) == (
        served.input_tokens, served.output_tokens,
    )  # fmt: skip
    assert await books.reserved() == 0


async def test_after_two_repairs_it_is_an_error(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider, books: Books
) -> None:
    with pytest.raises(StructuredOutputInvalid) as caught:
        await structured(usage, scope, asking(f"answers={WRONG}"), Mark, prompts=prompts, purpose=Purpose.MARKING)
    error = caught.value
    assert (error.code, error.retryable, error.details["attempts"], error.details["truncated"]) == (
        "bad_output", False, 3, False,
    )  # fmt: skip
    assert error.details["problems"] == ["points: Input should be less than or equal to 5"]
    assert len(provider.generations()) == 3
    entries = await books.entries()
    assert [(entry["purpose"], entry["status"]) for entry in entries] == [("marking", "completed")] * 3


async def test_an_answer_that_was_cut_off_is_not_asked_for_again(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider
) -> None:
    with pytest.raises(StructuredOutputInvalid, match="cut off") as caught:
        await structured(usage, scope, asking('answers={"points":3 end=length'), Mark, prompts=prompts)
    assert caught.value.details["truncated"] is True
    assert len(provider.generations()) == 1
    # What is whole all the same is good.
    assert await structured(usage, scope, asking(f"answers={GOOD} end=length"), Mark, prompts=prompts) == MARK


@pytest.mark.parametrize("model", ["gpt", "claude", "background"])
@pytest.mark.parametrize("end", ["filter", "refusal"])
async def test_a_refusal_is_an_error_of_its_own(
    *, usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider, model: str, end: str
) -> None:
    with pytest.raises(ContentFiltered):
        await structured(usage, scope, asking(f"answers=I_cannot. end={end}"), Mark, model, prompts=prompts)
    assert len(provider.generations()) == 1


async def test_other_errors_pass(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, alice: Account, provider: FakeProvider
) -> None:
    with pytest.raises(ModelError) as caught:
        await structured(usage, scope, asking("fail=401"), Mark, prompts=prompts)
    assert caught.value.code == "provider_auth"
    with pytest.raises(UnknownModel):
        await structured(usage, scope, asking("x"), Mark, "nobody", prompts=prompts)
    await set_budgets(alice, workspace_budget("0"))
    with pytest.raises(OverBudget):
        await structured(usage, scope, asking(f"answers={GOOD}"), Mark, prompts=prompts)
    assert len(provider.requests) == 1


async def test_a_repair_is_within_the_budgets_too(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("0.00000001"))
    with pytest.raises(OverBudget):
        await structured(usage, scope, asking(f"answers={WRONG}|{GOOD}"), Mark, prompts=prompts)
    assert len(provider.generations()) == 1
    assert (await books.entries())[0]["cost"] > Decimal(0)
    assert await books.reserved() == 0


async def test_the_request_is_kept_but_for_what_has_no_place_in_it(
    usage: UsageService, prompts: PromptLibrary, scope: Scope, provider: FakeProvider
) -> None:
    request = ModelRequest(
        (ModelMessage("system", (TextPart("Be fair."),)), ModelMessage("user", (TextPart(f"answers={GOOD}"),))),
        tools=(ToolSpec("t", "T.", {"type": "object"}),),
        tool_choice="required",
        stop=("}",),
        temperature=0.2,
        max_output_tokens=77,
    )
    assert await structured(usage, scope, request, Mark, "plain", prompts=prompts) == MARK
    body = bodies(provider)[-1]
    assert not {"tools", "tool_choice", "stop"} & body.keys()
    assert (body["temperature"], body["max_completion_tokens"]) == (0.2, 77)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"].startswith("Be fair.\n\nAnswer with one JSON object")
