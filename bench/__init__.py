"""What Corral costs, measured against the bare limit beside it. `python -m bench --help`."""
