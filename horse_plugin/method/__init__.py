"""The paper's equations on tensors, one file an idea; start here with the paper open.

    hypernetwork   (H, ∇G) → (H̃, ∇G̃)                    Sec. 2.3
    residual       R = c ⊙ ∇G̃, with c_i = −η Σ_j H_ij H̃_ij    Eq. 4
    spread         R'_1 … R'_T from R_1 … R_T              Eq. 5, 6
    metric         C̄ = (1−ρ) C/mean(diag C) + ρI, for Eq. 2      (I in the paper)
    ridge          ΔW = (HᵀH + e^λ C̄)⁻¹ Hᵀ R, and its derivatives   Eq. 2, 7
    losses         losses per answer token               Eq. 7
    finite         whether numbers are finite

Rows are answer tokens and columns are features: the transpose of the paper's notation. Lists run
over the edit modules l = 1 … T, from the lowest to the highest. This package imports
``distributed`` and ``errors`` only.
"""
