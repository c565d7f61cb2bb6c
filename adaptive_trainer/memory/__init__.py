"""What memory is used, by whom, how much there is, and how much a training will need."""
