"""Kill real runs and resume them; `python tools/chaos.py` is the command."""
