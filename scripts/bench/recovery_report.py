"""Table and plot of the recovery benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.bench.recovery_figures import PAPER_GAIN, PHASES

COLOURS = dict(
    zip(
        PHASES,
        ("#d62728", "#ff9896", "#7f7f7f", "#c7c7c7", "#bcbd22", "#9467bd", "#1f77b4", "#aec7e8", "#2ca02c"),
        strict=True,
    )
)


def line(label: str, variant: dict[str, Any]) -> str:
    """One variant in one line."""
    totals = sorted(one["seconds"] for one in variant["recoveries"])
    counts = sorted({int(one["iterations"]) for one in variant["recoveries"]})
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in variant["mean_phases"].items() if seconds > 0)
    again = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{label:16s} {variant['mean_seconds']:7.2f} s ({totals[0]:.2f} to {totals[-1]:.2f}, n={len(totals)}), "
        f"{again} iterations again: {phases}"
    )


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    machine = result["machine"]
    where = ", ".join(sorted(set(machine["devices"]))) or machine["processor"]
    size = f"{result['ranks']} ranks, {result['stages']} stages, {result['micro_batches']} micro-batches"
    pinned = "ranks pinned" if result["cores_of_ranks"] else "ranks not pinned"
    print(f"\n{result['model']}: {size}, W={result['window']}; {result['backend']}")
    print(f"{where}, {machine['cores']} cores, load {machine['load_before']:.1f} before, {pinned}")
    print("seconds from the kill until all ranks begin the interrupted iteration again (mean, least to most):")
    for label, variant in result["variants"].items():
        print("  " + line(label, variant))
    for name, one in result.get("dense_computed", {}).items():
        print(f"  {'dense':16s} {one['seconds']:7.2f} s computed, {one['iterations']:.1f} iterations again: {name}")
    for mode, one in result.get("comparison", {}).items():
        print_comparison(mode, one)
    for label, why in result["failed"].items():
        print(f"  {label}: NOT MEASURED: {why.splitlines()[0]}")


def print_comparison(mode: str, one: dict[str, Any]) -> None:
    """What localized recovery does against global rollback in one mode."""
    verdict = "within" if one["iterations_most"] <= one["iterations_bound"] else "OVER"
    print(
        f"  {mode}: localized replays {one['iterations_most']} iterations at most, {verdict} the bound of "
        f"{one['iterations_bound']}; other stages {one['iterations_of_other_stages']}, and they use "
        f"{100 * one['busy_share_of_others']:.1f}% of the processor seconds of the replay"
        + ("" if one["all_local"] else "; SOME RECOVERIES WERE GLOBAL")
    )
    for stage, found in one["stages"].items():
        if "gain" in found:
            print(
                f"    stage {stage}: {found['local_seconds_an_iteration']:.3f} s an iteration against "
                f"{found['global_seconds_an_iteration']:.3f} s, {100 * found['gain']:+.1f}% saved "
                f"(paper {100 * PAPER_GAIN:.0f}%)"
            )
        print(
            f"    stage {stage}, by processor seconds, as if each rank had a core: "
            f"{found['local_thread_seconds']:.3f} s against {found['critical_path_seconds']:.3f} s, "
            f"{100 * found['gain_on_own_cores']:+.1f}%"
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Stacked phases, one bar a variant, and a dot for every recovery."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    computed = result.get("dense_computed", {})
    names = [*result["variants"], *computed]
    figure, axes = pyplot.subplots(figsize=(10, 1.8 + 0.5 * len(names)), layout="constrained")
    seen = set()
    for row, variant in enumerate(result["variants"].values()):
        left = 0.0
        for phase, seconds in variant["mean_phases"].items():
            if seconds > 0:
                label = None if phase in seen else PHASES[phase]
                axes.barh(row, seconds, 0.62, left, color=COLOURS[phase], label=label)
                seen.add(phase)
            left += seconds
        axes.text(left, row - 0.02, f"  {left:.1f} s", va="center", fontsize=9)
        totals = [one["seconds"] for one in variant["recoveries"]]
        axes.scatter(totals, [row + 0.38] * len(totals), s=9, color="black", zorder=3)
    for row, one in enumerate(computed.values(), start=len(result["variants"])):
        again = one["seconds"] - one["fixed"]
        axes.barh(row, one["fixed"], 0.62, color="0.85", hatch="//", edgecolor="white")
        axes.barh(row, again, 0.62, one["fixed"], color=COLOURS["replayed"], hatch="//", edgecolor="white")
        axes.text(one["seconds"], row, f"  {one['seconds']:.1f} s computed", va="center", fontsize=9)
    measured = [f"dense, every {result['dense_interval']}" if n == "dense" else n for n in result["variants"]]
    labels = [*measured, *(f"dense, {name} (every {one['interval']})" for name, one in computed.items())]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds from the kill until all ranks begin the interrupted iteration again (dots: single kills)")
    machine = result["machine"]
    where = ", ".join(sorted(set(machine["devices"]))) or f"{machine['cores']} cores"
    axes.set_title(f"One worker killed: {result['ranks']} ranks, W={result['window']}, {where}", loc="left")
    figure.legend(fontsize=8, ncols=3, loc="outside lower center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
