"""What lets a run of hours continue after a kill: a lock, a journal, hidden states."""
