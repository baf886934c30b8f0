"""mkdocs hooks that add files from outside docs/ and an API page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import d2v_fast

ROOT = Path(__file__).parents[1]
MODULES = ["d2v_fast.config", "d2v_fast.masking", "d2v_fast.ops"]  # documented completely, after the public names


def home() -> str:
    """README.md with links as seen from docs/."""
    return (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")


def api() -> str:
    """The API page, in mkdocstrings syntax."""
    names = [f"{d2v_fast._HOME[name]}.{name}" for name in d2v_fast.__all__ if name in d2v_fast._HOME]
    return "# API\n\n" + "\n".join(f"::: {name}" for name in [*names, *MODULES])


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=home()))
    files.append(File.generated(config, "api.md", content=api()))
    for plot in (ROOT / "benchmarks" / "results").glob("*.svg"):
        files.append(File.generated(config, plot.relative_to(ROOT).as_posix(), abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../", "](")
