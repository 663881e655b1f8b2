"""Training the weights of chosen blocks themselves, without an adapter: which layers, and the models it ends with."""
