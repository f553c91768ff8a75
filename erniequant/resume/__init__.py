"""Continuing a run of hours after a kill: a lock, a journal, hidden states."""
