"""Our diagnosis of recorded public runs against what a careful reader of their curves said.

    python benchmarks/real_runs.py RUNS            print the table
    python benchmarks/real_runs.py RUNS --write    and put it into docs/real_runs.md

RUNS holds one folder a run with `log.jsonl` (or `.gz`, or a `raw_trainer_state.json`), `label.json` and
`source.json`. Each run is given to `diagnose` as a user would give it: the file alone, no settings, no method.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.rules.registry import all_rules

DOC = Path(__file__).resolve().parents[1] / "docs" / "real_runs.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"

# What a label calls a pathology -> the rules that are about it. An empty tuple: no rule of ours is yet.
RULES_OF: dict[str, tuple[str, ...]] = {
    "nan_or_inf": ("NUM001", "NUM002"),
    "truncation_saturation": ("RL016",),
    "reward_std_collapse": ("RL001", "RL002", "RL003", "RL004", "RL023"),
    "zero_gradient": ("NUM008", "RL001", "RL002", "RL003", "RL004"),
    "entropy_collapse": ("RL005",),
    "entropy_explosion": ("RL006",),
    "kl_blowup": ("RL007",),
    "grad_explosion": ("NUM005",),
    "length_explosion": ("RL015",),
    "reward_drop": ("RL033",),
    "reward_plateau": ("RL031",),
    "overfitting": ("SFT001",),
    "loss_divergence": ("NUM009",),
    "stalled_no_learning": (),
    "learning_rate_schedule_mistake": (),
    "lr_zero_or_too_high": (),
    "dpo_chosen_collapse": (),
    "accuracy_chance": (),
    "accuracy_saturated_at_start": (),
    "other": (),
}
FIRED = ("firing", "suppressed", "resolved", "unknown")  # states that a diagnostic has only after it fired
BAD_VERDICTS = ("broken", "collapsing", "drifting", "over_optimising", "stalled_no_signal")


@dataclass
class Judged:
    """One run: what the label says, what we say, and how that compares."""

    id: str
    repo: str
    rows: int
    method: str
    health: str
    kinds: list[str]
    verdict: str
    fired: list[tuple[str, str, str]]  # code, severity, state
    kind_hit: dict[str, bool | None]  # None: no rule yet
    outcome: str
    seconds: float

    @property
    def alarms(self) -> list[str]:
        return [code for code, severity, _ in self.fired if severity != "info"]


def judge(folder: Path) -> Judged:
    label = json.loads((folder / "label.json").read_text(encoding="utf-8"))
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    path = next(p for name in ("raw_trainer_state.json", "log.jsonl", "log.jsonl.gz") if (p := folder / name).exists())
    start = time.perf_counter()
    report = diagnose(path)
    seconds = time.perf_counter() - start
    fired = [
        (d["code"], d["severity"], d["state"])
        for d in report["diagnostics"]
        if d["state"] in FIRED and d.get("fired_step") is not None
    ]
    codes = {code for code, _, _ in fired}
    kinds = list(dict.fromkeys(p["kind"] for p in label.get("pathologies", [])))
    unmapped = [kind for kind in kinds if kind not in RULES_OF]
    if unmapped:
        raise SystemExit(f"{folder.name}: RULES_OF does not know the kinds {unmapped}")
    kind_hit = {k: (bool(codes.intersection(RULES_OF[k])) if RULES_OF[k] else None) for k in kinds}
    verdict = report["verdict"]["state"]
    alarms = [code for code, severity, _ in fired if severity != "info"]
    return Judged(
        id=folder.name,
        repo=source.get("repo", folder.name),
        rows=report["source"]["rows"],
        method=report["method"],
        health=label["health"],
        kinds=kinds,
        verdict=verdict,
        fired=fired,
        kind_hit=kind_hit,
        outcome=_outcome(label["health"], kind_hit, alarms, verdict),
        seconds=seconds,
    )


def _outcome(health: str, kind_hit: dict[str, bool | None], alarms: list[str], verdict: str) -> str:
    if health == "healthy":
        if alarms:
            return "false alarm"
        return "false verdict" if verdict in BAD_VERDICTS else "clean"
    if health == "unclear":
        return "not judged"
    known = [hit for hit in kind_hit.values() if hit is not None]
    if not known:
        return "no rule yet"
    if all(known):
        return "match"
    return "partly" if any(known) else "miss"


# ---------------------------------------------------------------------- the page


def table(runs: list[Judged]) -> str:
    lines = [
        "| run | method | rows | label | our verdict | diagnostics | outcome |",
        "|---|---|---|---|---|---|---|",
    ]
    order = {"pathological": 0, "unclear": 1, "healthy": 2}
    for run in sorted(runs, key=lambda r: (order[r.health], r.id)):
        kinds = ", ".join(
            f"{kind} {'(no rule yet)' if hit is None else '(found)' if hit else '(not found)'}"
            for kind, hit in run.kind_hit.items()
        )
        marks = {"suppressed": " (explained)", "resolved": " (resolved)"}
        fired = ", ".join(
            f"{code}{' info' if severity == 'info' else ''}{marks.get(state, '')}"
            for code, severity, state in run.fired
        )
        label = f"{run.health}: {kinds}" if kinds else run.health
        lines.append(
            f"| {run.id} | {run.method} | {run.rows} | {label} | {run.verdict} | {fired or '–'} | {run.outcome} |"
        )
    return "\n".join(lines)


def totals(runs: list[Judged]) -> str:
    """Counts over runs, and shares averaged per repository (runs of one repository are not independent)."""
    healthy = [r for r in runs if r.health == "healthy"]
    sick = [r for r in runs if r.health == "pathological"]
    judged = [r for r in sick if r.outcome != "no rule yet"]
    kinds = [hit for r in sick for hit in r.kind_hit.values() if hit is not None]

    def per_repository(chosen: list[Judged], share: Any) -> tuple[float, int]:
        groups: dict[str, list[float]] = defaultdict(list)
        for run in chosen:
            groups[run.repo].append(share(run))
        means = [sum(v) / len(v) for v in groups.values()]
        return (sum(means) / len(means) if means else float("nan")), len(means)

    def hits(run: Judged) -> float:
        known = [hit for hit in run.kind_hit.values() if hit is not None]
        return sum(known) / len(known)

    clean, clean_repos = per_repository(healthy, lambda r: float(r.outcome == "clean"))
    found, found_repos = per_repository(judged, hits)
    any_alarm, any_repos = per_repository(sick, lambda r: float(bool(r.alarms) or r.verdict in BAD_VERDICTS))
    lines = [
        "| | runs | averaged per repository |",
        "|---|---|---|",
        f"| healthy, no warning and no bad verdict | {sum(r.outcome == 'clean' for r in healthy)} of {len(healthy)} "
        f"| {clean:.0%} of {clean_repos} |",
        f"| pathologies found, of those we have a rule for | {sum(kinds)} of {len(kinds)} in {len(judged)} runs "
        f"| {found:.0%} of {found_repos} |",
        f"| pathological, with any warning or a bad verdict | "
        f"{sum(bool(r.alarms) or r.verdict in BAD_VERDICTS for r in sick)} of {len(sick)} | {any_alarm:.0%} of {any_repos} |",
        f"| pathological, of kinds without a rule yet | {len(sick) - len(judged)} of {len(sick)} | |",
        f"| unclear, not judged | {sum(r.health == 'unclear' for r in runs)} | |",
    ]
    return "\n".join(lines)


def page(runs: list[Judged]) -> str:
    return (
        f"{len(runs)} runs of {len({r.repo for r in runs})} repositories, {len(all_rules())} rules.\n\n"
        f"{totals(runs)}\n\n{table(runs)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of recorded runs")
    parser.add_argument("--write", action="store_true", help="replace the generated part of docs/real_runs.md")
    parser.add_argument("--only", help="runs whose id contains this")
    parser.add_argument("--messages", action="store_true", help="print what each diagnostic says")
    args = parser.parse_args()
    if not args.runs.is_dir():
        print(f"{args.runs}: there is no such folder of runs", file=sys.stderr)
        return 2
    folders = [p for p in sorted(args.runs.iterdir()) if (p / "label.json").is_file() and (args.only or "") in p.name]
    runs = [judge(folder) for folder in folders]
    if args.messages:
        for run, folder in zip(runs, folders):
            print(f"\n== {run.id}: {run.health} {run.kinds} -> {run.verdict}, {run.outcome}")
            path = next(
                p for n in ("raw_trainer_state.json", "log.jsonl", "log.jsonl.gz") if (p := folder / n).exists()
            )
            report = diagnose(path)
            print(f"   {report['verdict']['reason']}")
            for d in report["diagnostics"]:
                print(
                    f"   {d['code']} {d['severity']} {d['state']} first {d['first_step']} fired {d['fired_step']} "
                    f"onset {d['onset_step']} last {d['last_step']} count {d['count']}: {d['message']}"
                )
            for n in report["not_checked"]:
                print(f"      {n['code']} not checked: {n['reason']}")
    text = page(runs)
    print(text)
    slowest = max(runs, key=lambda r: r.seconds)
    print(f"\n{sum(r.seconds for r in runs):.1f} s in all; slowest {slowest.id}, {slowest.seconds:.2f} s")
    if args.write:
        before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        DOC.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
        print(f"wrote {DOC}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
