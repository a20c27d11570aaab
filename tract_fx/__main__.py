"""The `tract-fx` command, also `python -m tract_fx`."""

from tract_fx.shell.app import app

if __name__ == "__main__":
    app()
