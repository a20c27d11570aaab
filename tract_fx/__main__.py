"""The `tract-fx` command, also `python -m tract_fx`."""

import sys


def main() -> None:
    """Run the command; say which extra is missing where typer or rich are not there."""
    try:
        from tract_fx.shell.app import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit(f"tract-fx needs {error.name}: pip install 'tract_fx[shell]'")
    app()


if __name__ == "__main__":
    main()
