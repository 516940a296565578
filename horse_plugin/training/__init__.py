"""Training the hypernetwork (Eq. 7). Imports: everything from errors to editing."""
