"""The demo's agent: another process, which knows the run only by its directory.

It waits for a firing diagnostic whose suggestion can take effect live, applies it, and waits for the judgement. It
loads no torch: any program can do the same.
"""

import sys
import time

from outspoken.agent_api import NotARun, RequestRefused, Run

ACTOR = "demo-agent"
MOST_CHANGES = 4
POLL_SECONDS = 0.1
PATIENCE_STEPS = 8


def say(text: str) -> None:
    print(f"[agent] {text}", flush=True)


def work(path: str, since: float = 0.0) -> None:
    """Follow the run that began after `since` (seconds since the epoch) until it ends; ask for a few changes at most."""
    run = wait_for_run(path, since)
    failed: set[tuple[str, str]] = set()
    asked = 0
    while run.alive and asked < MOST_CHANGES:
        suggestion = next((s for s in run.suggestions(["auto", "suggest"]) if usable(run, s, failed)), None)
        if suggestion is None:
            time.sleep(POLL_SECONDS)
            continue
        explained = settle(run, suggestion["diagnostic"])
        set_to = ", ".join(f"{op['path'][1:]}={op['value']}" for op in suggestion["patch"] if op["op"] != "test")
        say(f"{suggestion['code']} fires{explained}; it suggests: {suggestion['title']}. Asking for {set_to}.")
        try:
            change = run.wait_for(run.apply(suggestion, actor=ACTOR))
            if change["state"] == "failed":  # a failed change is taken back, which is recorded next
                change = run.wait_for(change["id"], states=["rolled_back"], timeout=30)
        except (RequestRefused, TimeoutError) as problem:
            say(f"no change: {problem}")
            failed.add(key(suggestion))
            continue
        asked += 1
        say(f"the change is {change['state']} at step {change['step']}: {change['reason']}.")
        if change["state"] != "verified":
            failed.add(key(suggestion))


def settle(run: Run, diagnostic: str) -> str:
    """Watch some steps more before acting, and say what the diagnostic turned out to explain."""
    try:
        run.wait_for(step=run.step + PATIENCE_STEPS, timeout=60)
    except TimeoutError:
        return ""
    record = next((d for d in run.diagnostics() if d["id"] == diagnostic), None)
    held = [d["code"] for d in run.diagnostics(state="suppressed") if record and cause_of(d, record["code"])]
    return f" and explains {', '.join(held)}" if held else ""


def cause_of(effect: dict, code: str) -> bool:
    return any(cause["code"] == code for cause in effect["causes"])


def key(suggestion: dict) -> tuple[str, str]:
    return suggestion["id"], str(suggestion["patch"])


def usable(run: Run, suggestion: dict, failed: set[tuple[str, str]]) -> bool:
    """Whether it is for the settings as they are now, and the trainer can carry it out as it runs."""
    if not suggestion["patch"] or key(suggestion) in failed:
        return False
    try:
        run.plan(suggestion, actor=ACTOR)
    except RequestRefused:
        return False
    return True


def wait_for_run(path: str, since: float) -> Run:
    while True:
        try:
            run = Run(path)
            if run.record["started"] >= since:
                return run
        except NotARun:
            pass
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    work(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
