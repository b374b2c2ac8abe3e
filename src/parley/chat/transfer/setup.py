"""Puts files together: attachments, exports and imports. The shell calls it once per process."""

from dataclasses import dataclass

from parley.chat.attachments.background import cleaners
from parley.chat.attachments.service import AttachmentService
from parley.chat.attachments.stores import AttachmentStore, BucketStore, PostgresStore
from parley.chat.transfer.exporting import Exporter
from parley.chat.transfer.importing import Importer
from parley.core.buckets import Bucket
from parley.core.db import Database
from parley.core.settings import AttachmentSettings
from parley.jobs.cleaning import Cleaner
from parley.realtime.log import Publisher


@dataclass(frozen=True, slots=True)
class Files:
    """What one process does with files."""

    attachments: AttachmentService
    exporter: Exporter
    importer: Importer
    bucket: BucketStore | None

    @property
    def cleaners(self) -> list[Cleaner]:
        """What removes files that nobody has."""
        return cleaners(self.bucket)


def build_files(database: Database, bucket: Bucket | None, publisher: Publisher, settings: AttachmentSettings) -> Files:
    """Build the stores that are configured: new files go to one of them, old ones are read from where they are."""
    stores: dict[str, AttachmentStore] = {"postgres": PostgresStore(database)}
    outside = BucketStore(bucket) if bucket is not None else None
    if outside is not None:
        stores["s3"] = outside
    attachments = AttachmentService(database, settings, stores)
    return Files(attachments, Exporter(database, attachments), Importer(database, attachments, publisher), outside)
