"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("tract_fx")
except PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "0+unknown"
