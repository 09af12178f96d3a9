"""Launch a recipe on a Monarch proc mesh; `python tools/monarch.py` is the command."""
