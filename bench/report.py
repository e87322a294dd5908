"""Raw benchmark rows → one table, and plots of how cost grows: `python bench/report.py out.json… --markdown table.md`.

Reads pytest-benchmark's JSON. `--plot FILE.svg` needs matplotlib (`pip install vreflection[bench]`).
"""

import argparse
import json
import re
from pathlib import Path

COLUMNS = ("case", "dtype", "ours", "torch", "base", "ratio", "torch ratio", "speed of light", "share")


def rows_of(paths: list[Path]) -> list[dict]:
    return [
        {"name": row["name"], **row["extra_info"]}
        for path in paths
        for row in json.loads(path.read_text())["benchmarks"]
    ]


def shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def table(rows: list[dict]) -> str:
    """Timed rows as Markdown; memory and host-time rows below, as they came."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        if "median_s" not in row:
            continue
        median, ratio, base = row["median_s"], row["speedup"], row["speedup_over"]
        ours = next(iter(median))
        light, share = row.get("speed_of_light_s"), row.get("share_of_light", {}).get(ours)
        cells = [
            row["name"].removeprefix("test_"), row.get("dtype", ""), shown(median[ours]), shown(median.get("torch")),
            f"{base} {shown(median[base])}", f"{ratio[ours]:.2f}x",
            f"{ratio['torch']:.2f}x" if "torch" in ratio else "",
            shown(light), "" if share is None else f"{100 * share:.0f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if "extra_peak_bytes" in row:
            extra = row["extra_peak_bytes"]
            told = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in extra.items())
            lines.append(f"\n{row['name'].removeprefix('test_')}: {told} (ratio {extra['auto'] / extra['stock']:.3f})")
        for name, value in row.get("microseconds", {}).items():
            lines.append(f"\n{row['name'].removeprefix('test_')}, {name}: {value:.1f} us")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], target: Path) -> None:
    """Seconds against one swept size at a time, ours and the base, with the speed of light."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    sweeps: dict[str, list[tuple[int, dict]]] = {}
    for row in rows:
        swept = re.fullmatch(r"test_growth\[(.+)-(\d+)\]", row["name"])
        if swept:
            sweeps.setdefault(swept[1], []).append((int(swept[2]), row))
    if not sweeps:
        raise SystemExit("no rows of bench_growth.py in these files: nothing to plot")
    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(4.2 * len(sweeps), 3.6), squeeze=False)
    for axis, (name, points) in zip(axes[0], sorted(sweeps.items())):
        points.sort(key=lambda point: point[0])
        sizes = [size for size, _ in points]
        for variant in points[0][1]["median_s"]:
            axis.plot(sizes, [1e3 * row["median_s"][variant] for _, row in points], marker="o", label=variant)
        axis.plot(sizes, [1e3 * row["speed_of_light_s"] for _, row in points], "k:", label="speed of light")
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms, forward and backward")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = rows_of(options.files)
    text = table(rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
