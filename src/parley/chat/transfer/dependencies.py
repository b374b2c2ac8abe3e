"""What the routes of exports and imports ask for."""

from typing import Annotated

from fastapi import Depends, Request

from parley.chat.transfer.exporting import Exporter
from parley.chat.transfer.importing import Importer


async def _exporter(request: Request) -> Exporter:
    exporter: Exporter = request.app.state.files.exporter
    return exporter


async def _importer(request: Request) -> Importer:
    importer: Importer = request.app.state.files.importer
    return importer


ExporterDep = Annotated[Exporter, Depends(_exporter)]
ImporterDep = Annotated[Importer, Depends(_importer)]
