# SPDX-License-Identifier: Apache-2.0
"""The metrics of benchmarks/objects.py, and what follows from them."""

from dataclasses import dataclass

TOLERANCE = 0.1  # dB


@dataclass
class Row:
    """Figures of a variant's fit of some length."""

    variant: str
    epochs: float
    rgb: float
    latent: float | None
    ae: float | None
    constant: float | None
    bytes: int
    shared_bytes: int
    views: float
    stage1_seconds: float | None
    fit_seconds: float | None
    seconds_per_object: float


def flat_from(curve: dict[float, float], tolerance: float = TOLERANCE) -> float | None:
    """The smallest length from which on a curve {length: PSNR} is flat: it and all longer ones are at most
    ``tolerance`` under the longest. None where that is the longest itself, or there is only one: nothing shows it."""
    lengths = sorted(curve)
    flat = None
    for length in reversed(lengths[:-1]):
        if curve[length] < curve[lengths[-1]] - tolerance:
            break
        flat = length
    return flat


def table(rows: list[Row]) -> str:
    """All fits, and what follows from them: base planes against plain ones, and where the curves are flat."""
    lines = [
        f"{'variant':8s} {'epochs':>6s} {'RGB dB':>7s} {'latent':>7s} {'AE':>7s} {'constant':>8s} {'bytes':>8s} "
        f"{'shared':>9s} {'views':>6s} {'stage 1':>8s} {'fit':>8s} {'s/object':>9s}"
    ]

    def number(value: float | None, form: str) -> str:
        width = form.split(".")[0]
        return f"{'-':>{width}s}" if value is None else f"{value:{form}f}"

    for row in rows:
        lines.append(
            f"{row.variant:8s} {row.epochs:6g} {row.rgb:7.2f} {number(row.latent, '7.2')} {number(row.ae, '7.2')} "
            f"{number(row.constant, '8.2')} {row.bytes:8d} {row.shared_bytes:9d} {row.views:6.0f} "
            f"{number(row.stage1_seconds, '6.0')} s {number(row.fit_seconds, '6.0')} s {row.seconds_per_object:9.3f}"
        )
    lines.append("")
    by_key = {(row.variant, row.epochs): row for row in rows}
    for row in rows:
        plain = by_key.get(("plain", row.epochs))
        if plain is not None and row.variant != "plain":
            lines.append(
                f"{row.variant}, {row.epochs:g} epochs: {row.rgb - plain.rgb:+.2f} dB to plain, which has "
                f"{plain.bytes / row.bytes:.2f}x its bytes a scene"
            )
    for variant in dict.fromkeys(row.variant for row in rows):
        curve = {row.epochs: row.rgb for row in rows if row.variant == variant}
        flat = flat_from(curve)
        if flat is not None:
            cost = by_key[variant, flat].seconds_per_object
            lines.append(f"{variant}: flat within {TOLERANCE} dB from {flat:g} epochs on: {cost:.3f} s an object")
        elif len(curve) > 1:
            lines.append(f"{variant}: not flat within {TOLERANCE} dB at {max(curve):g} epochs: fit longer (--lengths)")
    return "\n".join(lines)
