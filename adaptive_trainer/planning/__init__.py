"""What will fit: a plan for every rung of a ladder, and what earlier runs have found out."""
