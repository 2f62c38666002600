"""Log-probabilities of answers: what a model is given token by token, and one pass over many answers to a prompt."""
