"""How much memory a recipe needs, known before it runs, with no GPU."""
