"""Other ways to run an update than operator by operator."""
