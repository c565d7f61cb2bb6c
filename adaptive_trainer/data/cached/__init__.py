"""Images decoded once: made, stored, and given to the device by a thread."""
