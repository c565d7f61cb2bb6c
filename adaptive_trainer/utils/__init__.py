"""What every room may use: files, random numbers, the screen, the state of the process."""
