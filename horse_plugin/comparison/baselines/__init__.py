"""EasyEdit's own methods as rows of a comparison. Imports: the engine, EasyEdit."""
