"""`python -m adaptive_trainer`."""

from adaptive_trainer.cli import main

if __name__ == "__main__":
    main()
