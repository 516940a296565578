"""Files: written whole or not at all, with checksums and locks. Imports: errors, distributed."""
