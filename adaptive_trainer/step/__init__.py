"""One update as a transaction: it happens wholly, or it leaves no trace."""
