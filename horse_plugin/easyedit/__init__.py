"""HORSE as one of EasyEdit's methods. Imports: everything from errors to training, and EasyEdit."""
