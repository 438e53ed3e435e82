"""The table and the curve of docs/smollm2.md, from the run directory of `examples/grpo_smollm2.py`.

python docs/make_curve.py OUTPUT_DIR [--svg docs/smollm2_reward.svg]
"""

import argparse
from pathlib import Path

from outspoken.diagnostics.sources import read

EVERY = 10  # steps of a column, and of the running mean
SIGNALS = (  # name, unit, digits after the point, factor
    ("rewards/in_order/mean", "", 2, 1.0),
    ("rewards/brief/mean", "", 2, 1.0),
    ("reward", "", 2, 1.0),
    ("completions/mean_length", " (tokens)", 1, 1.0),
    ("entropy", " (nats/token)", 2, 1.0),
    ("groups/zero_std", "", 2, 1.0),
    ("sampling/abs_mean", " (nats, in 1e-6)", 1, 1e6),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 52, 16, 16, 40
HIGHEST = 2.0  # of the reward


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(rows: list[dict[str, float]]) -> str:
    starts = range(0, len(rows), EVERY)
    lines = [
        "| steps | " + " | ".join(f"{i + 1}–{min(i + EVERY, len(rows))}" for i in starts) + " |",
        "|---|" + "---|" * len(starts),
    ]
    for name, unit, digits, factor in SIGNALS:
        cells = []
        for i in starts:
            seen = [row[name] for row in rows[i : i + EVERY] if name in row]
            cells.append(f"{factor * mean(seen):.{digits}f}" if seen else "–")
        lines.append(f"| `{name}`{unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve(rewards: list[float]) -> str:
    """The reward of each step as a dot, and the mean over the last ten steps as a line."""
    last = len(rewards) - 1

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * i / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - value) / HIGHEST

    levels = [HIGHEST * k / 4 for k in range(5)]
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in levels
    )
    steps = [1, *range(20, last + 1, 20), last + 1]
    ticks = "".join(
        f'<text x="{x(s - 1):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{s}</text>' for s in steps
    )
    dots = "".join(f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="2"/>' for i, v in enumerate(rewards))
    smooth = [mean(rewards[max(0, i + 1 - EVERY) : i + 1]) for i in range(len(rewards))]
    line = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(smooth))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" role="img" aria-label="Reward of each step and its mean over ten steps">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
{grid}{ticks}
<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>
<text x="14" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 14 {middle:.0f})">reward (0 to {HIGHEST:g})</text>
<g fill="#9bbbd8">{dots}</g>
<polyline points="{line}" fill="none" stroke="#1f4e79" stroke-width="2"/>
</svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the output directory of the run")
    parser.add_argument("--svg", type=Path, help="file for the curve")
    args = parser.parse_args()
    rows = [dict(observation.signals) for observation in read(args.run).observations]
    print(table(rows))
    if args.svg:
        args.svg.write_text(curve([row["reward"] for row in rows if "reward" in row]))


if __name__ == "__main__":
    main()
