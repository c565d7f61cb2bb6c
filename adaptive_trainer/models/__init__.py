"""Networks, optimizers, losses, and the techniques that save their memory."""
