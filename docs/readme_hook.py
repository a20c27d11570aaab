"""The site's first page is the README, so that there is one text of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Give the first page the text of the README, its links led from docs/.

    Args:
        markdown: The page's own text.
        page: The page.
        config: The site's settings.
        **_: What else MkDocs passes.

    Returns:
        The text to render.
    """
    if page.file.src_uri != "index.md":
        return markdown
    readme = Path(config.config_file_path).with_name("README.md").read_text()
    return readme.replace("](docs/", "](")
