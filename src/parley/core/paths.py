"""Where the files that ship beside the code are: migrations, prompts, the model registry."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def project_path(name: str) -> Path:
    """Return the path of a shipped file or folder: in the checkout, else inside the installed package."""
    checkout = _PACKAGE.parents[1] / name
    return checkout if checkout.exists() else _PACKAGE / "_project" / name
