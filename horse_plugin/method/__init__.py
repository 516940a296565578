"""The paper's equations on tensors: hypernetwork (Sec. 2.3), residual (Eq. 4), spread (Eq. 5, 6),
ridge (Eq. 2). Imports: errors, distributed.
"""
