"""Puts the outbox and its dispatcher together. The shell calls it once per process."""

from collections.abc import Iterable
from dataclasses import dataclass

from parley.core.db import Database
from parley.core.settings import JobSettings
from parley.jobs import background
from parley.jobs.cleaning import Cleaner, Cleaning
from parley.jobs.dispatcher import Dispatcher
from parley.jobs.inprocess import InProcessDispatcher
from parley.jobs.registry import JobRegistry, JobType, Periodic
from parley.jobs.schedule import Schedule
from parley.realtime.log import Publisher


@dataclass(frozen=True, slots=True)
class Jobs:
    """The jobs of one process."""

    registry: JobRegistry
    dispatcher: Dispatcher


def build_jobs(
    *,
    database: Database,
    publisher: Publisher,
    settings: JobSettings,
    types: Iterable[JobType],
    cleaners: Iterable[Cleaner] = (),
    periodic: Iterable[Periodic] = (),
) -> Jobs:
    """Build the dispatcher of the kinds that the modules list, and of the work that comes back."""
    cleaning = Cleaning([*background.cleaners(settings), *cleaners])
    schedule = Schedule(database, [cleaning.periodic, *periodic])
    registry = JobRegistry([*types, *schedule.types])
    dispatcher = InProcessDispatcher(database, registry, publisher, settings, schedule=schedule)
    return Jobs(registry, dispatcher)
