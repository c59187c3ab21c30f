"""Commands that show runs and sweeps to people."""
