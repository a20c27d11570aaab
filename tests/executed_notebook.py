"""The tutorial, executed; as a script, it keeps the outputs in the notebook (`make notebook`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

TUTORIAL = Path(__file__).resolve().parent.parent / "examples" / "tutorial.ipynb"


def stored() -> NotebookNode:
    """The notebook as it is in the project."""
    notebook: NotebookNode = nbformat.read(TUTORIAL, as_version=4)
    return notebook


def executed() -> NotebookNode:
    """Execute its cells in a kernel of their own, in a folder that is removed."""
    notebook = stored()
    with tempfile.TemporaryDirectory() as folder:
        # Sockets instead of ports, and nothing of the user's own IPython. What differs from one
        # machine to the next is not kept: times, and Python's version.
        config = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})
        client = NotebookClient(notebook, timeout=300, record_timing=False, config=config)
        client.execute(cwd=folder, env=os.environ | {"IPYTHONDIR": f"{folder}/ipython"})
    del notebook.metadata.language_info["version"]
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), TUTORIAL)
