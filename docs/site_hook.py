"""Pages whose one text stands outside docs: the README and the tutorial."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: Any) -> None:
    """Add the tutorial, from its notebook.

    Args:
        files: The site's files, changed in place.
        config: The site's settings.
    """
    examples = Path(config.config_file_path).with_name("examples")
    notebook = json.loads((examples / "tutorial.ipynb").read_text())
    text = "\n\n".join(map(_markdown, notebook["cells"]))
    files.append(File.generated(config, "tutorial.md", content=text))


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Give the first page its text, and lead links to the site's pages.

    Args:
        markdown: The page's own text.
        page: The page.
        config: The site's settings.
        **_: What else MkDocs passes.

    Returns:
        The text to render.
    """
    if page.file.src_uri == "index.md":
        readme = Path(config.config_file_path).with_name("README.md")
        markdown = readme.read_text()
    for link, target in {
        "](docs/": "](",
        "](../docs/": "](",
        "](../examples/tutorial.ipynb)": "](tutorial.md)",
        "](examples/tutorial.ipynb)": "](tutorial.md)",
    }.items():
        markdown = markdown.replace(link, target)
    return markdown


def _markdown(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    code = f"```python\n{source}\n```"
    return "\n\n".join([code, *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    """An output in the form that says most."""
    data = output.get("data", {})
    if "text/html" in data:
        return "".join(data["text/html"])
    for kind in ("image/svg+xml", "image/png"):
        if kind in data:
            content = "".join(data[kind])
            if kind == "image/svg+xml":
                content = base64.b64encode(content.encode()).decode()
            return f'<img alt="" src="data:{kind};base64,{content}">'
    return f"```text\n{''.join(output['text'])}```"
