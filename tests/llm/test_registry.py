from decimal import Decimal
from pathlib import Path

import pytest

from parley.llm.errors import ModelNotUsable, RegistryInvalid, UnknownModel
from parley.llm.registry import ModelInfo, ModelRegistry

SHIPPED = Path(__file__).parents[2] / "llm_registry.yaml"
GOOD = """\
providers:
  one: {kind: openai, base_url: "${ONE_URL:-https://one.example/v1/}", api_key: "${ONE_KEY:-}"}
  two: {kind: anthropic, base_url: "http://127.0.0.1:1", api_key: "${TWO_KEY}"}
  own: {kind: openai, base_url: "${OWN_URL:-}"}
  demo: {kind: demo}
models:
  first:
    provider: one
    name: "${ONE_MODEL:-one-large}"
    price: {input: 0.25, output: 2}
    capabilities: [tools]
    timeouts: {connect: 1, first_token: 2}
    fallbacks: [second, demo]
  second: {provider: two, name: "two-${SIZE:-small}-x", context: "${CONTEXT:-1000}"}
  own: {provider: own, name: own}
  demo: {provider: demo, name: demo}
aliases:
  default: [first, second, demo]
  fast: second
"""


def load(tmp_path: Path, text: str = GOOD, **environ: str) -> ModelRegistry:
    path = tmp_path / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    return ModelRegistry.load(path, environ)


def test_entries_have_what_a_call_needs(tmp_path: Path) -> None:
    entry = load(tmp_path, ONE_KEY="k").resolve("first")
    assert (entry.provider, entry.kind, entry.name) == ("one", "openai", "one-large")
    assert entry.base_url == "https://one.example/v1"
    assert entry.api_key is not None
    assert entry.api_key.get_secret_value() == "k"
    assert "k'" not in repr(entry.api_key)
    assert (entry.price.input, entry.price.cached_input, entry.price.output) == (
        Decimal("0.25"),
        Decimal("0.25"),
        Decimal(2),
    )
    assert (entry.timeouts.connect, entry.timeouts.first_token, entry.timeouts.idle) == (1, 2, 30)
    assert entry.fallbacks == ("second", "demo")


def test_variables_are_filled_into_any_text(tmp_path: Path) -> None:
    registry = load(tmp_path, TWO_KEY="k", SIZE="big", CONTEXT="2000", ONE_MODEL="")
    assert registry.resolve("second").name == "two-big-x"
    assert registry.resolve("second").context == 2000
    assert {entry.id: entry.name for entry in registry.entries()}["first"] == "one-large"


def test_describe_tells_what_is_usable_and_why_the_rest_is_not(tmp_path: Path) -> None:
    described = load(tmp_path, TWO_KEY="k").describe()
    assert described[0] == ModelInfo(
        id="first", provider="one", usable=False, reason="ONE_KEY is not set", capabilities=["tools"]
    )
    assert {info.id: info.reason for info in described} == {
        "first": "ONE_KEY is not set",
        "second": None,
        "own": "OWN_URL is not set",
        "demo": None,
    }
    assert list(described[0].model_dump()) == ["id", "provider", "usable", "reason", "capabilities"]


def test_a_provider_without_a_key_field_needs_only_its_url(tmp_path: Path) -> None:
    assert load(tmp_path, OWN_URL="http://127.0.0.1:1/v1").resolve("own").api_key is None


def test_a_loopback_url_does_not_replace_the_key(tmp_path: Path) -> None:
    registry = load(tmp_path, ONE_URL="http://127.0.0.1:1/v1")
    with pytest.raises(ModelNotUsable, match="ONE_KEY is not set"):
        registry.resolve("first")


def test_an_alias_gives_its_first_usable_model(tmp_path: Path) -> None:
    assert load(tmp_path).resolve(None).id == "demo"
    assert load(tmp_path, TWO_KEY="k").resolve().id == "second"
    assert load(tmp_path, TWO_KEY="k", ONE_KEY="k").resolve("default").id == "first"
    assert load(tmp_path).aliases == {"default": ("first", "second", "demo"), "fast": ("second",)}


def test_what_cannot_be_resolved(tmp_path: Path) -> None:
    registry = load(tmp_path)
    with pytest.raises(UnknownModel):
        registry.resolve("third")
    with pytest.raises(ModelNotUsable, match="TWO_KEY is not set"):
        registry.resolve("fast")


def test_only_usable_fallbacks_are_offered(tmp_path: Path) -> None:
    registry = load(tmp_path, ONE_KEY="k")
    assert [entry.id for entry in registry.fallbacks(registry.resolve("first"))] == ["demo"]


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("context:", "contxt:", 14, 'unknown key "contxt"'),
        ("timeouts: {connect", "timeouts: {conect", 12, 'unknown key "conect"; remove it or use one of: connect'),
        ("price: {input", "price: {inputs", 10, 'unknown key "inputs"'),
        ("{kind: demo}", "{kind: demo, region: eu}", 5, 'unknown key "region"'),
        ("aliases:", "extra: {}\naliases:", 17, 'unknown key "extra"'),
        ("    provider: one\n", "    provider: won\n", 8, 'unknown provider "won"; use one of: one, two, own, demo'),
        ("[second, demo]\n  second", "[second, dmo]\n  second", 13, 'unknown model "dmo"'),
        ("[second, demo]\n  second", "[first]\n  second", 13, "cannot be its own fallback"),
        ("[first, second, demo]", "[first, thrd]", 18, 'unknown model "thrd"'),
        ("fast: second", "fast: [second,\n   thrd]", 20, 'unknown model "thrd"'),
        ("fast: second", "own: second", 19, '"own" is already the id of a model'),
        ("  default:", "  standard:", 17, 'the alias "default" is missing'),
        ("kind: anthropic", "kind: cohere", 3, "input should be 'openai', 'openai_responses', 'anthropic' or 'demo'"),
        ("{input: 0.25", "{input: cheap", 10, '"models.first.price.input" is not valid'),
        ("{input: 0.25", "{input: -1", 10, "greater than or equal to 0"),
        ("first_token: 2", "first_token: soon", 12, '"models.first.timeouts.first_token" is not valid'),
        ("[tools]", "[tools, flying]", 11, "input should be 'tools'"),
        ("    capabilities: [tools]", "    prefill: prefixed", 11, "input should be 'plain', 'prefix' or"),
        ('{provider: two, name: "two', '{prefill: prefix, provider: two, name: "two', 14, "use one of: plain"),
        (
            "name: demo}",
            "name: demo, prefill: prefix}",
            16,
            'the kind "demo" know no prefill "prefix"; use one of: plain',
        ),
        ("    name: ", "    nothing: ", 9, 'unknown key "nothing"'),
        ("name: own}", "price: {}}", 15, '"models.own.name" is missing'),
        ("${SIZE", "${SI ZE", 14, 'a variable is written "${NAME}"'),
        ("one-large}", "}", 9, "the value comes from ONE_MODEL"),
        ("https://one.example/v1/", "one.example", 2, "base_url must start with http"),
        ("  own: {provider", "  first: {provider", 15, '"first" stands here a second time'),
        ("  first:\n", "  first\n", 8, "not valid YAML"),
        ("  first:\n", "  fir st:\n", 7, '"fir st" is not a valid name'),
        ("default: [", "default: [*y, ", 18, "found undefined alias"),
        ("aliases:\n", "aliases: &x\n  loop: *x\n", 1, "the file contains itself"),
        ("{provider: two, ", "{provider: two, fallbacks: [first], ", 14, "in a circle (first → second → first)"),
        ("name: own}", "name: own, fallbacks: [demo, demo]}", 15, '"demo" stands here a second time'),
        ("[first, second, demo]", "[first, second, first]", 18, '"first" stands here a second time'),
        ("[tools]", "[tools, tools]", 11, '"tools" stands here a second time'),
        (
            '{kind: openai, base_url: "${OWN',
            '{kind: openai, flavour: acme, base_url: "${OWN',
            4,
            'unknown flavour "acme"',
        ),
        ("{kind: demo}", "{kind: demo, flavour: vllm}", 5, "have no flavour; remove it"),
        ("{kind: demo}", "{kind: demo, headers: {a b: c}}", 5, '"a b" is not the name of a header'),
        ("{kind: demo}", "{kind: demo, headers: {Authorization: c}}", 5, "give the key as api_key"),
        ("{kind: demo}", "{kind: demo, headers: {Host: c}}", 5, "is set by the adapter"),
        ("{kind: demo}", '{kind: demo, headers: {x-a: "c\\r\\nd"}}', 5, "one line of ASCII text"),
        ("{kind: demo}", "{kind: demo, headers: {x-a: [1]}}", 5, '"providers.demo.headers.x-a" is not valid'),
        ("name: own}", "name: own, background: false}", 15, "have no background; remove it"),
        ("name: own}", "name: own, parameters: {stream: false}}", 15, 'the parameter "stream" is set by the adapter'),
        ("name: own}", "name: own, retries: 11}", 15, '"models.own.retries" is not valid'),
        ("name: own}", "name: own, timeouts: {total: 0}}", 15, '"models.own.timeouts.total" is not valid'),
    ],
)
def test_a_mistake_is_told_with_file_line_and_remedy(
    tmp_path: Path, before: str, after: str, line: int, words: str
) -> None:
    assert before in GOOD
    with pytest.raises(RegistryInvalid) as caught:
        load(tmp_path, GOOD.replace(before, after, 1), ONE_KEY="k")
    assert (caught.value.line, caught.value.path) == (line, tmp_path / "registry.yaml"), str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'registry.yaml'}, line {line}: ")
    assert words in str(caught.value)


def test_a_model_may_say_how_it_takes_the_beginning_of_its_answer(tmp_path: Path) -> None:
    assert {entry.prefill for entry in load(tmp_path).entries()} == {None}
    for style in ("plain", "prefix", "continue_final_message"):
        text = GOOD.replace("name: own}", f"name: own, prefill: {style}}}")
        assert load(tmp_path, text, OWN_URL="http://127.0.0.1:1/v1").resolve("own").prefill == style
    text = text.replace("own: {kind: openai,", "own: {kind: openai_responses,")
    with pytest.raises(RegistryInvalid, match=r'line 15: .* "openai_responses" know no prefill .*; remove it'):
        load(tmp_path, text)


def test_a_circle_of_fallbacks_is_found_however_long(tmp_path: Path) -> None:
    text = GOOD.replace("{provider: two, ", "{provider: two, fallbacks: [own], ")
    load(tmp_path, text)
    text = text.replace("name: own}", "name: own, fallbacks: [demo, first]}")
    with pytest.raises(RegistryInvalid, match=r"line 15: .*first → second → own → first"):
        load(tmp_path, text)


def test_what_a_provider_and_a_model_may_say_beside(tmp_path: Path) -> None:
    headers = 'headers: {X-Title: Parley, HTTP-Referer: "${REFERER:-}"}'
    text = GOOD.replace("own: {kind: openai,", f"own: {{kind: openai, flavour: vllm, {headers},")
    entry = load(tmp_path, text, OWN_URL="http://127.0.0.1:1/v1").resolve("own")
    assert (entry.flavour, dict(entry.headers), entry.background) == ("vllm", {"X-Title": "Parley"}, True)
    text = text.replace("kind: anthropic", "kind: openai_responses").replace(
        "{provider: two,", "{provider: two, background: false,"
    )
    assert not load(tmp_path, text, TWO_KEY="k").resolve("second").background


def test_what_reading_from_a_cache_and_writing_to_it_costs(tmp_path: Path) -> None:
    price = load(tmp_path, ONE_KEY="k").resolve("first").price
    assert (price.cached_input, price.cache_write, price.image) == (Decimal("0.25"), Decimal("0.25"), Decimal(0))
    text = GOOD.replace("{input: 0.25,", "{input: 0.25, cached_input: 0.02, cache_write: 0.3, image: 0.001,")
    price = load(tmp_path, text, ONE_KEY="k").resolve("first").price
    assert (price.cached_input, price.cache_write, price.image) == (Decimal("0.02"), Decimal("0.3"), Decimal("0.001"))


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b\n", "\x00"])
def test_a_file_that_is_no_registry(tmp_path: Path, text: str) -> None:
    with pytest.raises(RegistryInvalid, match="line 1"):
        load(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RegistryInvalid, match="cannot be read"):
        ModelRegistry.load(tmp_path / "none.yaml", {})


def test_a_mistake_does_not_show_the_key(tmp_path: Path) -> None:
    with pytest.raises(RegistryInvalid) as caught:
        load(tmp_path, GOOD.replace('api_key: "${ONE_KEY:-}"', 'api_key: ["sk-secret"]'))
    assert "sk-secret" not in str(caught.value)


def test_the_shipped_registry_answers_with_the_demo_model_until_a_key_is_set() -> None:
    assert ModelRegistry.load(SHIPPED, {}).resolve().id == "demo"
    assert ModelRegistry.load(SHIPPED, {"OPENAI_API_KEY": "k"}).resolve().id == "gpt"
    assert ModelRegistry.load(SHIPPED, {"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "k"}).resolve().id == "sonnet"
    assert ModelRegistry.load(SHIPPED, {"LOCAL_LLM_URL": "http://127.0.0.1:11434/v1"}).resolve().id == "local"
    assert set(ModelRegistry.load(SHIPPED, {}).aliases) == {"default", "fast", "marking", "trading"}
