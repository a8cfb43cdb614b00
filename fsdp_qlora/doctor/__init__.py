"""The command `doctor`: looks at this machine and says what would be slow or fail in a run, and what to do about it."""
