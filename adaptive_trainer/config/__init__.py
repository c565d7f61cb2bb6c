"""The settings: their schema, how they are composed, and what is wrong with them. No torch."""
