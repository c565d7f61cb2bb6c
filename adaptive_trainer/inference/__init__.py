"""What a trained network is good for: predictions, evaluation, export."""
