"""Builds exports and erasures for the shell, which knows what every module has of people."""

from collections.abc import Sequence
from dataclasses import dataclass

from parley.core.db import Database
from parley.core.mail import Mailer
from parley.core.personal_data import PersonalData
from parley.core.revocations import Revocations
from parley.core.settings import Settings
from parley.identity.erasures import ConfirmPassword, ErasureService
from parley.identity.exports import ExportService
from parley.jobs.registry import JobType, Periodic


@dataclass(frozen=True, slots=True)
class People:
    """What the shell keeps of exports and erasures."""

    exports: ExportService
    erasures: ErasureService

    @property
    def job_types(self) -> tuple[JobType, ...]:
        """Return the jobs of both."""
        return (*self.exports.job_types(), *self.erasures.job_types())

    @property
    def periodics(self) -> tuple[Periodic, ...]:
        """Return what is to be done from time to time."""
        return self.exports.periodics()


def build_people(
    database: Database,
    parts: Sequence[PersonalData],
    *,
    settings: Settings,
    confirm: ConfirmPassword,
    revocations: Revocations,
    mailer: Mailer,
) -> People:
    """Build both. `parts` are in the order of erasure: the account itself comes last."""
    return People(
        ExportService(database, parts, mailer=mailer, base_url=settings.base_url),
        ErasureService(
            database,
            parts,
            confirm=confirm,
            revocations=revocations,
            mailer=mailer,
            days=settings.auth.erasure_days,
        ),
    )
