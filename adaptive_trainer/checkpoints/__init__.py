"""What a run leaves to be taken up again: written whole, looked at before it is believed."""
