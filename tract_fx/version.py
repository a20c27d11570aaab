"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tract_fx")
except PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "0+unknown"
