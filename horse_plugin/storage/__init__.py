"""What goes to disk: safetensors and JSON, written whole or not at all, checked when read.

    files     atomic writing, new folders, one writer a folder
    tensors   tensors and their JSON description in one checksummed safetensors file
    schema    the form that a JSON description must have
    digest    digests of text, JSON values, tensors and weights
    hub       folders on the Hugging Face hub

A checksum detects accidents, not forgeries. So the form of every description is checked too, and
the error names the field.
This package imports ``distributed`` and ``errors`` only.
"""
