"""The language model: the only code that depends on how models are built; none by name.

    loading       the model that the hparams name: files, device, dtype
    modules       its transformer blocks and edit modules, found by their shape
    quantising    the trunk's weights in 4 bits
    sharding      the trunk's weights, shared out over processes
    fingerprint   how a model is recognised
    guard         a caller's model: held by one thread, and given back as it was
    backward      backward passes of the positions that need a gradient
    halves        its forward pass cut in two: trunk, and edited blocks with the head
    backbone      how prompts come to the halves: tokenised, batched, shared out, kept
    weights       edit weights: adding shifts, restoring bits, gradients
    trunk_cache   the trunk's states of prompts, kept from one call to the next
    sampling      ordinary text that the model writes itself
    moments       second moments of keys, and their files
    preserve      what an edit leaves alone, and the metric C̄ of it
    capture       keys and gradients of an edit (H, ∇G), in one pass (Sec. 2.1)

This package imports ``hparams`` and what stands above it.
"""
