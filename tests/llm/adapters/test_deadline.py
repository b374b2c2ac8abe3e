import asyncio

import pytest

from parley.llm.adapters.deadline import ReadDeadline


def after(delay_s: float) -> float:
    return asyncio.get_running_loop().time() + delay_s


async def never() -> bytes:
    await asyncio.Event().wait()
    return b""


async def soon() -> bytes:
    await asyncio.sleep(0.01)
    return b"x"


async def test_a_read_in_time_gives_its_value_and_leaves_the_task_alone() -> None:
    deadline = ReadDeadline()
    for _ in range(5):
        assert await deadline.read(soon, after(0.1)) == b"x"
    await asyncio.sleep(0.15)  # the timer fires between two reads and must not touch the task
    assert await deadline.read(soon, after(0.1)) == b"x"
    deadline.close()


@pytest.mark.parametrize("reads_before", [0, 3])
async def test_a_late_read_times_out_at_its_own_deadline(reads_before: int) -> None:
    deadline = ReadDeadline()
    for _ in range(reads_before):
        await deadline.read(soon, after(5))
    began_at = after(0)
    with pytest.raises(TimeoutError):
        await deadline.read(never, after(0.05))
    assert 0.04 < after(0) - began_at < 4
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    deadline.close()


async def test_a_later_deadline_replaces_an_earlier_one() -> None:
    deadline = ReadDeadline()
    await deadline.read(soon, after(0.03))
    began_at = after(0)
    with pytest.raises(TimeoutError):
        await deadline.read(never, after(0.15))
    assert after(0) - began_at > 0.1
    deadline.close()


async def test_a_cancel_from_outside_stays_a_cancel() -> None:
    deadline = ReadDeadline()
    task = asyncio.create_task(deadline.read(never, after(5)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline.close()


async def test_a_cancel_in_the_same_moment_as_the_deadline_stays_a_cancel() -> None:
    deadline = ReadDeadline()
    task = asyncio.create_task(deadline.read(never, after(0)))
    await asyncio.sleep(0)
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline.close()


async def test_an_error_of_the_read_passes() -> None:
    async def fails() -> bytes:
        raise OSError("gone")

    deadline = ReadDeadline()
    with pytest.raises(OSError, match="gone"):
        await deadline.read(fails, after(5))
    deadline.close()
