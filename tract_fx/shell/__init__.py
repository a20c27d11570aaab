"""The shell: the `tract-fx` command."""
