"""From the captured keys and gradients of an edit to the tensors of its delta (Eq. 4, 6, 2)."""

import math
from collections.abc import Sequence

import torch

from horse_plugin.distributed import gather_rows, raise_on_all_ranks
from horse_plugin.editing.archive import to_edit_device
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.in_force import InForce
from horse_plugin.errors import HALF_PRECISION_HINT, HorseError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.finite import all_finite, first_not_finite
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.method.metric import times_root, whitened
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Capture
from horse_plugin.model.loading import own_random_numbers

Roots = Sequence[torch.Tensor | None]


def new_network(backbone: Backbone, hparams: HORSEHyperParams) -> HyperNetwork:
    """Return an untrained hypernetwork: the identity, seeded, with η if ``lr`` gives it."""
    with own_random_numbers():
        torch.manual_seed(hparams.seed)
        network = HyperNetwork(
            backbone.shapes,
            hparams.rank,
            hparams.n_blocks,
            hparams.spread,
            hparams.spread_strength,
            hparams.coefficient,
            hparams.normalizer,
            hparams.residual_cap is not None,
        )
    network.tf32 = hparams.network_tf32
    if hparams.lr is not None:
        torch.nn.init.constant_(network.log_eta, math.log(hparams.lr))
    return to_edit_device(network, backbone)


def calibrate(network: HyperNetwork, captured: Capture, hparams: HORSEHyperParams, roots: Roots):
    """Take an edit into the network's normalisers; the first edit also sets η, λ and the cap.

    η is set by ``strength`` unless ``lr`` gives it, λ by ``ridge`` and the cap by ``residual_cap``
    if they are given.

    Args:
        roots: W with W Wᵀ = C̄⁻¹ for each edit module, or None for C̄ = I.
    """
    keys, grads = moving_rows(captured)
    if hparams.ridge is not None and not network.has_statistics:
        in_metric = [
            h if w is None else times_root(h.to(w), w) for h, w in zip(keys, roots, strict=True)
        ]
        network.calibrate_ridge(in_metric, hparams.ridge)
    network.update_normalizers(keys, grads)
    if not network.has_eta:
        network.calibrate_eta(
            keys,
            grads,
            captured.value_norms,
            hparams.strength,
            hparams.editor_batch_size,
        )
    if network.has_cap and not all_finite(network.largest):
        network.calibrate_cap(captured.value_norms, hparams.residual_cap)


def moving_rows(captured: Capture) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the keys and gradients of a capture without its ``still`` rows."""
    keys, grads = captured.keys, captured.grads
    if captured.still.any():
        keys, grads = ([x[~captured.still.to(x.device)] for x in xs] for xs in (keys, grads))
    return keys, grads


def residuals_of(
    network: HyperNetwork, captured: Capture, hparams: HORSEHyperParams, raw=None
) -> list[torch.Tensor]:
    """Return R'_1 … R'_T, n×d' each (Eq. 4, then Eq. 5 or 6), as long as their tokens ask for.

    A row whose token costs less than ``full_loss`` is shortened in proportion, so that an answer
    that almost holds is not pushed as hard as one that does not. The capture's ``still`` rows are
    0, and have no part in Eq. 6.

    Args:
        raw: R_1 … R_T of :func:`moving_rows` before the spread, if they are known.
    """
    (keys, grads), moving = moving_rows(captured), ~captured.still
    if raw is None:
        residuals = network.residuals(keys, grads, hparams.editor_batch_size)
    else:
        residuals = network.spread_out(raw, keys, grads)
    if hparams.full_loss is not None:
        share = (captured.losses[moving, None] / hparams.full_loss).clamp(max=1)
        residuals = [r * share.to(r) for r in residuals]
    at = moving.nonzero()[:, 0]
    return [
        r.new_zeros(len(moving), r.shape[1]).index_copy(0, at.to(r.device), r) for r in residuals
    ]


@torch.no_grad()
def edit_residuals(
    backbone: Backbone, network: HyperNetwork, captured: Capture, hparams: HORSEHyperParams
) -> list[torch.Tensor]:
    """Return :func:`residuals_of` the edit, checked.

    Raises:
        HorseError: a residual is not finite; the message names the record and the module.
    """
    residuals = residuals_of(network, captured, hparams)
    with raise_on_all_ranks():
        for name, r in zip(backbone.modules, residuals, strict=True):
            if (row := first_not_finite(r)) is not None:
                record = captured.record_of_row[row].item()
                raise HorseError(
                    f"record {record}: {name}: its residual is not finite. {HALF_PRECISION_HINT}"
                )
    return residuals


def edit_mus(network: HyperNetwork, hparams: HORSEHyperParams) -> torch.Tensor:
    """Return the ridge term of an edit for each edit module, e^λ times ``edit_ridge``."""
    return (network.lamda.detach() + math.log(hparams.edit_ridge)).exp()


@torch.no_grad()
def ridge_of(
    l: int, backbone: Backbone, captured: Capture, mus: torch.Tensor, roots: Roots
) -> Ridge:
    """Return Eq. 2 of an edit's keys in the l-th edit module.

    Args:
        mus: as :func:`edit_mus` returns them.
        roots: as in :func:`calibrate`.

    Raises:
        HorseError: the system cannot be solved; the message names the module and a record.
    """
    keys = captured.keys[l]
    try:
        return Ridge(keys, mus[l], roots[l])
    except HorseError as error:
        record = _record_of_largest_row(captured, keys)
        name = list(backbone.modules)[l]
        raise HorseError(f"{name}: {error} Record {record} has the largest keys.") from None


@torch.no_grad()
def solve(
    backbone: Backbone,
    network: HyperNetwork,
    captured: Capture,
    residuals: list[torch.Tensor],
    hparams: HORSEHyperParams,
    roots: Roots,
    in_force: InForce | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a delta: Eq. 2 for each edit module.

    The ridge term is e^λ times ``edit_ridge``. Residuals that are trained under a larger ridge
    term learn to work with keys that they share with other facts. A large edit has many such keys,
    and holds better under a smaller one.

    Args:
        residuals: R' of each edit module, n×d'.
        roots: as in :func:`calibrate`.
        in_force: the edits under this one.

    Raises:
        HorseError: a system cannot be solved, or a shift is not finite; the message names the
            module and a record.
    """
    tensors = {}
    mus = edit_mus(network, hparams)
    for l, (name, r) in enumerate(zip(backbone.modules, residuals, strict=True)):
        ridge = ridge_of(l, backbone, captured, mus, roots)
        if in_force:
            r = r - captured.keys[l].to(r) @ in_force.shifts[l]
            solved = {"shift": ridge.shift(r) - in_force.pulled(l, ridge)}
        else:
            solved = ridge.smallest_form(r)
        if not all(map(all_finite, solved.values())):
            record = _record_of_largest_row(captured, r)
            raise HorseError(
                f"{name}: the shift is not finite. {HALF_PRECISION_HINT} "
                f"Record {record} has the largest residual."
            )
        tensors |= {f"{name}.{part}": t for part, t in solved.items()}
    return tensors


def predicted_cost(
    backbone: Backbone,
    tensors: dict[str, torch.Tensor],
    roots: Roots,
    in_force: InForce | None = None,
) -> float:
    """Return Σ_l tr(ΔW_lᵀ C̄_l ΔW_l), what the metric says that ordinary text feels of an edit.

    It is Σ_l ‖W_l⁻¹ΔW_l‖², where ΔW is the shift of the edit and of those in force together.

    Args:
        tensors: what :func:`solve` returned.
    """
    total, shifts = 0.0, EditDelta(tensors, []).lazy_shifts()
    for l, name in enumerate(backbone.modules):
        shift = shifts[name] + (in_force.shifts[l] if in_force else 0)
        total += whitened(shift, roots[l]).square().sum().item()
    return total


def _record_of_largest_row(captured: Capture, rows: torch.Tensor) -> int:
    norms = gather_rows(rows.norm(dim=-1)).nan_to_num(torch.inf)
    return gather_rows(captured.record_of_row)[norms.argmax().cpu()].item()
