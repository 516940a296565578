"""EasyEdit's own methods as rows of a comparison.

methods   each through its own ``apply`` function, from the same weights
mend      MEND's network, trained by EasyEdit's trainer
stats     second moments of keys, in the files that EasyEdit reads
targets   the target vectors of the MEMIT family, kept from one edit to the next
check     EasyEdit's own metrics beside ours
"""
