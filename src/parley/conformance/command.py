"""The command line: `parley conformance URL`, or `python -m parley.conformance URL`."""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import httpx

from parley.conformance.accounts import People
from parley.conformance.bench import Target
from parley.conformance.catalogue import SECTIONS
from parley.conformance.errors import CannotStart
from parley.conformance.report import Report
from parley.conformance.runner import Result, Runner, chosen

PROMPT = "repeat 300 word"


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        prog=prog,
        description="Check a server that claims parley.v1 from outside. Exit code 0: everything holds, 1: something "
        "does not, 2: the checks could not be made.",
    )
    made.add_argument("url", nargs="?", help="the server's address, such as http://localhost:3000")
    made.add_argument("--email", help="an account to check as; without one, a throw-away account is signed up")
    made.add_argument("--password", help="its password")
    made.add_argument("--token", help="an access token or an API key instead")
    made.add_argument("--second-email", help="an account in another workspace, where nobody can sign up")
    made.add_argument("--second-password", help="its password")
    made.add_argument("--prompt", default=PROMPT, help="a question whose answer takes some seconds (%(default)r)")
    made.add_argument(
        "--only", metavar="PATTERN", action="append", default=[],
        help="a section, a part of an id, or a glob such as '*.sse_*'; may be given again",
    )  # fmt: skip
    made.add_argument("--slow", action="store_true", help="also the checks that wait for timers of the server")
    made.add_argument("--timeout", type=float, default=15, metavar="S", help="for one check (%(default)s s)")
    made.add_argument("--patience", type=float, default=8, metavar="S", help="for one frame (%(default)s s)")
    made.add_argument("--jobs", type=int, default=4, metavar="N", help="checks at a time (%(default)s)")
    made.add_argument("--list", action="store_true", help="list the checks and make none")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--verbose", action="store_true", help="on failure, print every frame of the check")
    return made


def main(arguments: Sequence[str], *, prog: str = "python -m parley.conformance") -> int:
    """Run the command. Returns the exit code."""
    options = parser(prog).parse_args(arguments)
    checks = chosen(SECTIONS, options.only)
    if options.list:
        Report().listed(checks)
        return 0
    try:
        if options.url is None:
            raise CannotStart("which server? Give its address, such as http://localhost:3000")
        if not checks:
            raise CannotStart(f"no check is called {' or '.join(options.only)}; --list shows them all")
        return asyncio.run(run(options))
    except CannotStart as problem:
        sys.stderr.write(f"{prog}: {problem}\n")
        return 2
    except KeyboardInterrupt:
        return 130


async def run(options: argparse.Namespace) -> int:
    """Make the checks that the options name, and report. Returns the exit code; raises `CannotStart`."""
    report = Report(verbose=options.verbose)
    begun = time.monotonic()
    results = await examine(options, tell=None if options.json else report.result)
    finish = report.json if options.json else report.summary
    finish(results, seconds=time.monotonic() - begun, url=base_url(options.url))
    return 1 if any(result.outcome == "FAILED" for result in results) else 0


async def examine(options: argparse.Namespace, *, tell: Callable[[Result], None] | None = None) -> list[Result]:
    """Make the checks that the options name; `tell` is told of each. Raises `CannotStart`."""
    url = base_url(options.url)
    given = _pair(options.email, options.password, "--email and --password")
    second = _pair(options.second_email, options.second_password, "--second-email and --second-password")
    results: list[Result] = []
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(30, connect=5)) as http:
        try:
            people = await People.find(http, token=options.token, given=given, second=second)
        except (httpx.HTTPError, ValueError) as error:
            raise CannotStart(f"{url} does not answer: {str(error) or type(error).__name__}") from None
        target = Target(url, options.prompt, options.patience)
        runner = Runner(target, people, http, limit_s=options.timeout, jobs=max(options.jobs, 1), slow=options.slow)
        try:
            async for result in runner.run(chosen(SECTIONS, options.only)):
                results.append(result)
                if tell is not None:
                    tell(result)
        finally:
            if left := await people.leave():
                sys.stderr.write(f"These accounts were made and could not be closed: {', '.join(left)}\n")
    return results


def base_url(text: str) -> str:
    """Return a server's address without path. Raises `CannotStart`."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise CannotStart(f"{text} is not the address of a server")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/api/v1')}"


def _pair(first: str | None, second: str | None, names: str) -> tuple[str, str] | None:
    if (first is None) != (second is None):
        raise CannotStart(f"{names} belong together")
    return None if first is None or second is None else (first, second)
