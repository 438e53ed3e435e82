"""The process behind math_check.py: reads [right answer, completion] per line, writes [reward, right, read] per line.

It imports nothing of this package.
"""

import functools
import json
import logging
import signal
import sys
from contextlib import suppress
from typing import Any

PARSE_SECONDS = 5
COMPARE_SECONDS = 5
SHOWN = 500


def limit_memory(size: int) -> None:
    """Let allocations beyond `size` bytes fail, instead of the machine."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_next_seconds(seconds: int) -> None:
    """End this process after so much more computing: nobody else does if the process that asks has been killed."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def shown(parsed: list) -> str:
    """What was read, as text; printing a huge number can fail."""
    try:
        return str(parsed)[:SHOWN]
    except Exception as error:
        return f"[not printable: {type(error).__name__}]"


def main() -> None:
    replies = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which may want to finish its step
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
        from math_verify.errors import TimeoutException  # not an Exception
    except Exception as error:
        reply(f"{type(error).__name__}: {error}")
        return
    logging.disable(logging.CRITICAL)
    limit_memory(memory)
    # An answer has to be LaTeX; one in a box is preferred, and of several boxes the last one counts.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )

    @functools.lru_cache(maxsize=256)  # the completions of a prompt share it
    def right(text: str) -> tuple:
        return tuple(parse(text, parsing_timeout=PARSE_SECONDS))

    def check(gold: str, text: str) -> list:
        read = list(right(gold))
        if not read:
            return [None, "[unparseable]", "[skipped]"]
        answer = parse(text, extraction_config=[latex], extraction_mode="first_match", parsing_timeout=PARSE_SECONDS)
        equal = float(verify(read, answer, timeout_seconds=COMPARE_SECONDS))
        return [equal, shown(read), shown(answer) if answer else "[unparseable]"]

    reply("ready")
    for line in sys.stdin.buffer:
        limit_next_seconds(int(2 * seconds) + 1)
        try:
            reply(check(*json.loads(line)))
        except (Exception, TimeoutException) as error:  # on this pair: no answer was verified
            reply([0.0, "", f"[{type(error).__name__}]"])


if __name__ == "__main__":
    main()
