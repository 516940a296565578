"""What goes to disk: safetensors and JSON, written whole or not at all, checked when read.

    files     atomic writing, new folders, one writer a folder
    tensors   tensors and their JSON description in one checksummed safetensors file
    schema    the form that a JSON description must have
    digest    digests of text, JSON values, tensors and weights

A checksum tells accidents, not forgeries: whatever is read is also checked for its form, by name.
This package imports ``distributed`` and ``errors`` only.
"""
