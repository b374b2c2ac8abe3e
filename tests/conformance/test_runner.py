"""How checks are run: a few at a time, each for so long, and whatever happens in one is that one's result."""

import asyncio

import httpx

from parley.conformance.accounts import Account, People
from parley.conformance.bench import Bench, Target
from parley.conformance.errors import Failed, Skipped
from parley.conformance.runner import Result, Runner
from parley.conformance.section import Body, Check

NOWHERE = Target("http://127.0.0.1:9", "repeat 3 word", 1)


async def results_of(*bodies: Body, jobs: int = 4, limit_s: float = 5, slow: bool = False) -> list[Result]:
    checks = [Check("frames", f"check_{number}", "It holds.", body) for number, body in enumerate(bodies)]
    async with httpx.AsyncClient(base_url=NOWHERE.http_url) as http:
        people = People(http, Account("token"), second=None)
        runner = Runner(NOWHERE, people, http, limit_s=limit_s, jobs=jobs, slow=slow)
        return [result async for result in runner.run(checks)]


async def passes(_: Bench) -> None:
    await asyncio.sleep(0)


async def fails(bench: Bench) -> None:
    bench.transcript.sent("socket 1", {"t": "hb"})
    raise Failed("it is wrong", {"t": "ev"}, {"auth": {"token": "secret"}})


async def fails_without_frames(bench: Bench) -> None:
    for number in range(9):
        bench.transcript.sent("socket 1", {"t": "hb", "ts": number})
    raise Failed("it is wrong")


async def skips(_: Bench) -> None:
    raise Skipped("not here")


async def hangs(_: Bench) -> None:
    await asyncio.Event().wait()


async def stumbles(_: Bench) -> None:
    frame: dict[str, int] = {}
    print(frame["seq"])


async def knocks(bench: Bench) -> None:
    await bench.join()


async def test_each_has_its_own_result() -> None:
    results = await results_of(passes, fails, skips, passes)
    assert [result.outcome for result in results] == ["ok", "FAILED", "skipped", "ok"]
    assert (results[1].reason, results[1].frames) == ("it is wrong", ['{"t":"ev"}', '{"auth":"…"}'])
    assert len(results[1].transcript) == 1
    assert results[2].reason == "not here"


async def test_without_frames_the_last_ones_are_shown() -> None:
    (result,) = await results_of(fails_without_frames)
    assert len(result.frames) == 4
    assert '"ts":8' in result.frames[-1]


async def test_a_check_that_hangs_is_ended() -> None:
    hanging, passing = await results_of(hangs, passes, jobs=1, limit_s=0.05)
    assert (hanging.outcome, hanging.reason) == ("FAILED", "it was not done within 0.05 s")
    assert passing.outcome == "ok"


async def test_a_frame_that_lacks_a_field_is_a_failure() -> None:
    (result,) = await results_of(stumbles)
    assert result.outcome == "FAILED"
    assert "not the shape it must have (KeyError: 'seq')" in result.reason


async def test_a_server_that_has_gone_is_a_failure() -> None:
    (result,) = await results_of(knocks)
    assert result.outcome == "FAILED"
    assert "no socket could be opened" in result.reason


async def test_no_more_at_a_time_than_asked_for() -> None:
    running, most = 0, 0

    async def counts(_: Bench) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _turn in range(5):
            await asyncio.sleep(0)
        running -= 1

    results = await results_of(*[counts] * 9, jobs=3)
    assert [result.outcome for result in results] == ["ok"] * 9
    assert most == 3


async def test_slow_ones_wait_to_be_asked_for() -> None:
    check = Check("acks", "slow", "It holds.", passes, slow=True)
    async with httpx.AsyncClient(base_url=NOWHERE.http_url) as http:
        people = People(http, Account("token"), second=None)
        for slow, outcome in ((False, "skipped"), (True, "ok")):
            runner = Runner(NOWHERE, people, http, limit_s=1, jobs=1, slow=slow)
            assert [result.outcome async for result in runner.run([check])] == [outcome]
