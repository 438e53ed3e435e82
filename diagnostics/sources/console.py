"""Rows of metrics out of what a training printed: one reader per style, between any amount of other lines.

A style is a row of `STYLES`: its name, how much its rows count when the style of a file is told, and its reader, a
generator over segments of lines. A segment is what stands between two line ends or carriage returns (a progress bar
redraws itself after each), without colour codes. Nothing is evaluated: a Python dict is read as text.

The step is taken from the line that tells it. The bar of a Hugging Face progress, `12/1875 [`, is no such line: it goes
to stderr unbuffered and the dict to stdout, so that in a file the dict often follows a much later bar.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from outspoken.diagnostics import signals
from outspoken.diagnostics.sources.files import Row, UnreadableLog, count_of
from outspoken.diagnostics.sources.names import COMMON, EPOCHS, STEPS, SUMMARY

Segments = Iterable[tuple[int, str]]  # (number of the line, text)
Cells = dict[str, Any]

MAX_DEPTH = 4  # of dicts within a dict
MAX_CELLS = 20_000  # of one row
MAX_NAME = 300  # characters; a longer name is none of a metric
MAX_VALUE = 32_768  # characters of one value that is no plain number
MAX_BLOCK = 2_000  # lines of one dict that is printed over several
MAX_TRIES = 10  # dicts of one segment that cannot be read, before the rest of it is given up
MAX_CARRIED = 1024 * 1024  # characters of a line that comes in pieces
NUMERIC_SHARE = 0.6  # of a dict's values; with fewer numbers it is a sample or a configuration
LINES_SHOWN = 10


@dataclass
class _Tally:
    """What became of the lines.

    Attributes:
        lines: gone through, without blank ones. held: the last line that gave a row; failed: that failed. holding: lines that gave one.
        broken: numbers of lines that looked like metrics and could not be parsed in full, the first few.
        broken_count: how many they are; broken_lines: those of them that gave no row.
        open_end: whether the segment at hand is the last one and its line has no end.
        left_out: the cell that was left out for that reason.
        remarks: sentences for the user.
    """

    lines: int = 0
    held: int = 0
    failed: int = 0
    holding: int = 0
    broken: list[int] = field(default_factory=list)
    broken_count: int = 0
    broken_lines: int = 0
    open_end: bool = False
    left_out: str | None = None
    remarks: list[str] = field(default_factory=list)

    def hold(self, number: int) -> None:
        if number != self.held:
            self.held = number
            self.holding += 1

    def fail(self, number: int) -> None:
        if number == self.failed:
            return
        self.failed = number
        if self.broken_count < LINES_SHOWN:
            self.broken.append(number)
        self.broken_count += 1
        self.broken_lines += number != self.held

    def without_torn_end(self, row: Row) -> Row:
        """Without its last cell where the file ends within the line: the number may be cut."""
        if self.open_end and row:
            self.left_out, _ = row.popitem()
        return row


Reader = Callable[[Segments, _Tally], Iterator[Row]]


@dataclass(frozen=True)
class Style:
    """A form of printed metrics. `weight` is what one row counts against the rows of other styles."""

    name: str
    title: str
    read: Reader
    weight: float = 1.0


def find_style(lines: Sequence[str]) -> str | None:
    """The style of most rows in the head of a file, None if no line of it holds metrics in a form that is known.

    Of styles with as many rows the more specific one is taken. The forms that anybody's text may have by chance need
    rows that repeat, and four times the rows of a specific style.
    """
    segments = list(_segments(((i, line, True) for i, line in enumerate(lines, 1)), _Tally()))
    best, most = None, 0.0
    for style in STYLES:
        rows = style.read(segments, _Tally())
        count = sum(1 for _ in rows) if style.weight == 1 else _repeating(rows)
        if style.name == "table" and count and _is_plain_csv(lines):
            count = 0
        if count * style.weight > most:
            best, most = style.name, count * style.weight
    return best


def rows(lines: Iterator[tuple[int, str, bool]], style: str, path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of a console log.

    Args:
        lines: (number, text, whether it ended with a newline) of each line.
        style: one of `STYLES`, as `find_style` tells it.
        path: named in errors.
        notes: gets a sentence each on what was met, after the last row.

    Raises:
        UnreadableLog: the style is not known.
    """
    chosen = next((s for s in STYLES if s.name == style), None)
    if chosen is None:
        known = ", ".join(s.name for s in STYLES)
        raise UnreadableLog(f"{path}: console style {style!r} is not known; choose one of {known}.")
    tally = _Tally()
    yield from chosen.read(_segments(lines, tally), tally)
    others = tally.lines - tally.holding - tally.broken_lines
    rest = f"; {count_of(others, 'other line')} held no metrics" if others > 0 else ""
    notes.append(f"Read as console output: {chosen.title}{rest}.")
    notes.extend(tally.remarks)
    if tally.broken_count:
        shown = ", ".join(map(str, tally.broken)) + (" …" if tally.broken_count > len(tally.broken) else "")
        many = count_of(tally.broken_count, "line")
        notes.append(f"{many} looked like metrics but could not be read in full; what could not was skipped: {shown}.")
    if tally.left_out is not None:
        notes.append(f"The last line has no end, so its last value, {tally.left_out!r}, may be cut and was left out.")


def _repeating(found: Iterator[Row]) -> int:
    """How many rows share two names with another one: what stands there once may be so by chance."""
    forms = [tuple(row) for row in found]
    times = Counter(name for form in forms for name in form)
    return sum(1 for form in forms if sum(1 for name in form if times[name] > 1) >= 2)


# ---------------------------------------------------------------------- segments

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
_PREFIX = re.compile(r"^\s*(?:\([^()]{0,60}pid=\d+[^()]{0,60}\)|\[[\w/.:, -]{1,40}\]:?)\s?")


def _segments(lines: Iterable[tuple[int, str, bool]], tally: _Tally) -> Iterator[tuple[int, str]]:
    """The segments of lines; a line that comes in pieces is put together."""
    carried, number = "", 0
    for number, text, ended in lines:
        tally.lines += bool(text.strip())
        if carried:
            text, carried = carried + text, ""
        if "\x1b" in text:
            text = _ESCAPES.sub("", text)
        if ended and "\r" not in text:
            yield number, text
            continue
        *parts, last = text.split("\r")
        if ended:
            parts.append(last)
        else:
            carried = last[-MAX_CARRIED:]
        for part in parts:
            yield number, part
    if carried:
        tally.open_end = True
        yield number, carried


def _bare(text: str) -> str:
    """Without the prefixes that Ray, torchrun and launchpad put before a line."""
    while found := _PREFIX.match(text):
        text = text[found.end() :]
    return text


# ---------------------------------------------------------------------- numbers and names

_WORDS = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)\b"
_NOT_LOGGED = frozenset(("no log", "", "-", "–", "—", "n/a", "na", "none", "null", "nil"))
# Names that a configuration has as well: they show nothing.
_SETTINGS = frozenset(("learning_rate", "lr", "epoch", "entropy_coef", "num_tokens", "num_completions", "num_prompts"))
_MEASURED = re.compile(
    r"(?:^|[/_.:@-])(?:loss|nll|rewards?|accurac(?:y|ies)|acc|margins?|grad_?norm|gradient_norm|kl|entropy|perplexity"
    r"|ppl|returns?|score|f1|bleu|rouge\w*|wer|win_rate)(?:[/_@](?:mean|avg|std|max|min|sum|all|total|\d+))*$"
)
_NOT_MEASURED = re.compile(r"^(?:max|min|target|init|use|num|n|scale|log)_")
_LOSS = re.compile(r"(?:^|[/_.])(?:loss|grad_?norm)(?:[/_](?:mean|avg))?$")
_CLOCKS = frozenset((*STEPS, *EPOCHS, "episode"))


def _value(text: str) -> Any:
    """A number, None, or the text itself."""
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return _WORDS.get(text, text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(text: str) -> float | int:
    """A match of `_NUMBER` as a number."""
    value = _value(text.replace(",", "") if "," in text else text)
    return value if _is_number(value) else float("nan")


def _is_measured(name: str) -> bool:
    """Whether a name is one of a measurement, and not of a setting."""
    if len(name) > MAX_NAME:
        return False
    plain = name.strip().lower().replace(" ", "_")
    if plain in _SETTINGS or plain.rsplit("/", 1)[-1] in _SETTINGS:
        return False
    if signals.lookup(name) is not None or plain in SUMMARY or name.strip().lower() in COMMON:
        return True
    return _MEASURED.search(plain) is not None and _NOT_MEASURED.match(plain) is None


@lru_cache(maxsize=128)
def _evidence(names: tuple[str, ...]) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Of the names of a row: whether one counts steps or epochs, those that measure, and those of a loss."""
    plain = [name.strip().lower() for name in names]
    clock = any(name in _CLOCKS or name.rsplit("/", 1)[-1] in _CLOCKS or name == "train_runtime" for name in plain)
    measured = tuple(name for name in names if _is_measured(name))
    return clock, measured, tuple(name for name in measured if _LOSS.search(name.lower()))


def _is_metrics(row: Row) -> bool:
    """Whether a dict is a row of metrics, rather than a configuration or a sample of data.

    It names a measurement and counts steps or epochs beside it, or holds a loss and nothing but numbers.
    """
    clock, measured, losses = _evidence(tuple(row))
    if not measured:
        return False
    numbers = sum(1 for value in row.values() if _is_number(value))
    told = sum(1 for value in row.values() if value is not None and not isinstance(value, dict))
    if clock:
        return numbers >= NUMERIC_SHARE * told and any(_is_number(row[name]) for name in measured)
    return numbers == told and any(_is_number(row[name]) for name in losses)


def _measures(row: Row) -> bool:
    return any(_is_number(row[name]) for name in _evidence(tuple(row))[1])


# ---------------------------------------------------------------------- dicts as text

_PAIR = re.compile(
    r"""\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*:\s*(?:([-+\w.]+)|'([^'\\]{0,400})'|"([^"\\]{0,400})")\s*([,}])"""
)
_KEY = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*:\s*""")
_CALL = re.compile(r"[A-Za-z_][\w.]*\(")
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\[\](){}<>,]|[^'"\[\](){}<>,]+|['"]""")
_CLOSING = {"[": "]", "(": ")", "{": "}", "<": ">"}
_LEADING = re.compile(rf"\s*\[?\s*({_NUMBER})\s*(?:[\],)]|$)")
_END = re.compile(r"\s*([,}])")
_EMPTY = re.compile(r"\s*\}")


def _read_dict(text: str, at: int, depth: int = 0) -> tuple[Row, int, bool]:
    """The dict that begins at `at`: its cells, where it ends, and whether it is complete."""
    row: Row = {}
    at += 1
    while len(row) < MAX_CELLS:
        pair = _PAIR.match(text, at)
        if pair is not None:
            single, double, word, quoted, quoted2, end = pair.groups()
            name = single if single is not None else double
            if word is not None:
                value = _value(word)
                if isinstance(value, str):
                    return row, at, False
            else:
                value = _value(quoted if quoted is not None else quoted2)
            row[name] = value
            at = pair.end()
        else:
            key = _KEY.match(text, at)
            if key is None:  # {} or a comma before the brace
                closed = _EMPTY.match(text, at)
                return row, closed.end() if closed else at, closed is not None
            value, after = _read_value(text, key.end(), depth)
            ended = _END.match(text, after) if after >= 0 else None
            if ended is None:
                return row, at, False
            row[key.group(1)[1:-1]] = value
            at, end = ended.end(), ended.group(1)
        if end == "}":
            return row, at, True
    return row, at, False


def _read_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A value that is no plain word: a dict, np.float64(0.5), tensor(0.5, device='cuda:0'), a list, a long text."""
    if text.startswith("{", at):
        if depth >= MAX_DEPTH:
            return None, -1
        inner, end, complete = _read_dict(text, at, depth + 1)
        return inner, end if complete else -1
    end = _value_end(text, at)
    if end < 0:
        return None, -1
    piece = text[at:end].strip()
    call = _CALL.match(piece)
    if call is not None and piece.endswith(")"):
        leading = _LEADING.match(piece, call.end())
        return (_figure(leading.group(1)) if leading else piece[:100]), end
    if piece[:1] in "'\"":
        return piece[1:101].rstrip("'\""), end
    return piece[:100], end


def _value_end(text: str, at: int) -> int:
    """Where a value ends: at the comma or brace that is not within brackets or quotes; -1 if nowhere near."""
    expected: list[str] = []
    for token in _TOKEN.finditer(text, at, min(len(text), at + MAX_VALUE)):
        mark = token.group()
        if not expected and mark in (",", "}"):
            return token.start()
        if mark in _CLOSING:
            expected.append(_CLOSING[mark])
        elif expected and mark == expected[-1]:
            expected.pop()
        elif mark in ("]", ")", "}") and expected[-1:] != [">"]:
            return -1
    return -1


def _dicts(text: str, at: int = 0) -> Iterator[Row | None]:
    """The dicts of metrics in a segment; None for one that breaks off."""
    tries = 0
    while tries < MAX_TRIES and (at := text.find("{", at)) >= 0:
        if text[at + 1 : at + 2] not in ("'", '"'):
            at += 1
            continue
        row, end, complete = _read_dict(text, at)
        if complete:
            at = end
            if _is_metrics(row):
                yield row
            continue
        at += 1
        tries += 1
        if _evidence(tuple(row))[1]:
            yield None


# ---------------------------------------------------------------------- styles of one line


def _each(hint: str, parse: Callable[[str], Iterator[Row | None]], bracketed: bool) -> Reader:
    """A reader of single segments. `hint`: what each segment of metrics contains. `parse`: a segment's rows, None for
    one that breaks off. `bracketed`: whether a closing bracket shows that a row is whole.
    """

    def read(segments: Segments, tally: _Tally) -> Iterator[Row]:
        for number, text in segments:
            if hint not in text:
                continue
            for row in parse(text):
                if row is None:
                    tally.fail(number)
                    continue
                if not bracketed:
                    row = tally.without_torn_end(row)
                tally.hold(number)
                yield row

    return read


def _dict_rows(text: str) -> Iterator[Row | None]:
    return _dicts(text) if "'" in text or '"' in text else iter(())


def _dict_after(prefix: str) -> Callable[[str], Iterator[Row | None]]:
    """Rows of a line that tells the step, and then a dict."""
    head = re.compile(prefix)

    def parse(text: str) -> Iterator[Row | None]:
        tries = 0
        for found in head.finditer(text):
            if tries >= MAX_TRIES:
                return
            if not text.startswith("{", found.end()):
                continue
            row, _, complete = _read_dict(text, found.end())
            whole = complete and any(_is_number(value) for value in row.values())
            tries += not whole
            yield {"step": int(found.group(1)), **row} if whole else None

    return parse


_VERL_STEP = re.compile(r"(?<![\w/])step:(\d{1,15}) - ")
_VERL_VALUE = re.compile(rf"(?:np\.\w+\()?({_NUMBER}|True|False|None)\)?(?=\s|\(|$)")


def _verl_rows(text: str) -> Iterator[Row | None]:
    """`step:3 - actor/pg_loss:0.1 - critic/score/mean:np.float64(0.5)`, anywhere in a line."""
    heads = list(_VERL_STEP.finditer(text))
    for found, following in zip_longest(heads, heads[1:]):
        row: Row = {"step": int(found.group(1))}
        whole = True
        end = len(text) if following is None else following.start()
        cells = text[found.end() : end].split(" - ")
        for i, cell in enumerate(cells, 1):
            name, _, word = cell.rpartition(":")
            value = _value(word)
            if isinstance(value, str):  # np.float64(0.5); after the last one, what another process wrote on the line
                number = _VERL_VALUE.match(word)
                if number is None or (i < len(cells) and number.end() < len(word)):
                    whole = False
                    continue
                value = _value(number.group(1))
            row[name.strip()] = value
        if len(row) > 1:
            yield row
        if not whole:
            yield None


_STEP_BAR = re.compile(r"\bStep (\d{1,15}) \| ")
_TORCHTUNE = re.compile(rf"([A-Za-z_][\w/.@()%-]*):(?:({_NUMBER})|tensor\(\s*({_NUMBER})[^()]{{0,60}}\))(?:\s+|$)")


def _torchtune_rows(text: str) -> Iterator[Row | None]:
    """`Step 1 | loss:1.2 lr:2e-05`, as DiskLogger and StdoutLogger write it."""
    found = _STEP_BAR.search(text)
    if found is None:
        return
    row: Row = {"step": int(found.group(1))}
    at = found.end()
    while pair := _TORCHTUNE.match(text, at):
        row[pair.group(1)] = _figure(pair.group(2) or pair.group(3))
        at = pair.end()
    if len(row) > 1 and at == len(text):
        yield row
    elif len(row) > 2:
        yield None


# Labels of PRIME-RL's lines -> the names of its metrics.jsonl. The order of a label's words is its own.
_PRIME_NAMES = {
    "Time": "time/step",
    "Loss": "loss/mean",
    "Grad. Norm": "optim/grad_norm",
    "LR": "optim/lr",
    "Throughput": "perf/throughput",
    "MFU": "perf/mfu",
    "Peak Mem.": "perf/peak_memory",
    "Max Vio": "max_vio/mean",
    "Routing Conf.": "routing_confidence/mean",
}
_PRIME_OLD = {"Entropy": "entropy/mean", "Mismatch KL": "mismatch_kl/mean", "Reward": "reward/mean"}
_PRIME_NEW = {"Entropy": "entropy/all/mean", "Mismatch KL": "mismatch_kl/all/mean"}
# What no home-made line has: without one of these a line is not taken for PRIME-RL's.
_PRIME_SIGNS = frozenset(
    "Mismatch KL,Grad. Norm,Peak Mem.,Seq. Length,Async Level,Max. Off-Policy Level,Max Off-Policy,Trainable,"
    "Importance Ratio Error,Truncation,Routing Conf.,Max Vio,Val. Reward".split(",")
)
_PRIME_STEP = re.compile(r"\bStep (\d{1,15})(?: \||\]) ")
_PRIME_FIELD = re.compile(
    rf"([A-Z][A-Za-z. @-]*?)(:?) ?({_NUMBER})(?:/({_NUMBER}))?\s*(%|[A-Za-z][\w/]*)?\s*(?:\([^()]*\))?"
)
_DURATION = re.compile(r"(?:(\d+)d\s*)?(?:(\d+)h\s*)?(?:(\d+)m\s*)?(?:(\d+(?:\.\d+)?)s)?")


def _duration(text: str) -> float | None:
    """Seconds of `18m 23s`."""
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9@]+", "_", label.lower()).strip("_")


@lru_cache(maxsize=512)
def _prime_name(label: str, unit: str | None, old: bool) -> tuple[str, str]:
    """What a label's number is called, and the total behind it: a name of metrics.jsonl, or the label and its unit."""
    suffix = f"_{_slug('percent' if unit == '%' else unit)}" if unit else ""
    own = _slug(label) + suffix
    name = _PRIME_NAMES.get(label) or (_PRIME_OLD if old else _PRIME_NEW).get(label) or own
    return name, f"{_slug(label)}_of{suffix}"


def _prime_rows(text: str) -> Iterator[Row | None]:
    """`Step 12 | Time: 1.20s | Reward: 0.5 | …`, and since 0.6 `Step 12 | 18m 23s | Reward 0.5 | …`."""
    found = _PRIME_STEP.search(text)
    if found is None:
        return
    row: Row = {"step": int(found.group(1))}
    signed = good = False
    for piece in text[found.end() :].split("|"):
        piece = piece.strip()
        if piece[:1].isdigit() or piece.startswith("Time:"):
            seconds = _duration(piece.removeprefix("Time:").strip())
            if seconds is not None:
                row["time/step"] = seconds
                continue
        part = _PRIME_FIELD.fullmatch(piece)
        if part is None:
            good = False
            break
        label, colon, number, total, unit = part.groups()
        signed = signed or label in _PRIME_SIGNS
        name, of = _prime_name(label, unit, bool(colon))
        row[name] = _figure(number)
        if total is not None:
            row[of] = _figure(total)
        good = True
    if signed and good:
        yield row
    elif signed:
        yield None


# ---------------------------------------------------------------------- styles of several lines

_PRETTY_PAIR = re.compile(r"""^\s*(?:'[^']{1,300}'|"[^"]{1,300}")\s*:\s.{1,400}$""")


def _pretty_rows(segments: Segments, tally: _Tally) -> Iterator[Row]:
    """Dicts printed by pprint, of Python or of rich, over several lines; and those on one line.

    OAT prints each step so. Lines of other processes in between are passed over.
    """
    block: list[str] = []
    began = foreign = 0
    for number, text in segments:
        if block:
            text = _bare(text).lstrip("│| ").rstrip()
            if text == "}" or _PRETTY_PAIR.match(text):
                block.append(text)
                if text.endswith("}"):
                    row, _, complete = _read_dict(" ".join(block), 0)
                    block = []
                    if complete and _is_metrics(row):
                        tally.hold(number)
                        tally.holding += number - began
                        yield row
                    elif _evidence(tuple(row))[1] and not complete:
                        tally.fail(began)
                continue
            foreign += bool(text)
            if "{" not in text and len(block) < MAX_BLOCK and foreign < MAX_BLOCK:
                continue
            if any(_is_measured(name) for name in re.findall(r"""['"]([^'"]{1,200})['"]\s*:""", block[-1])):
                tally.fail(began)
            block = []
        if "{" not in text:
            continue
        start = _bare(text).strip()
        if start == "{" or (start.startswith("{") and _PRETTY_PAIR.match(start[1:]) and start.endswith(",")):
            block, began, foreign = [start], number, 0
            continue
        for found in _dicts(text):
            if found is None:
                tally.fail(number)
            else:
                tally.hold(number)
                yield found


_NEMO_HEADER = re.compile(r"(?<!=)={5,} (Step|Epoch) (\d{1,12})/(\d{1,12}) ={5,}")
_NEMO_SECTION = re.compile(
    r"^\W*(Training Results|Validation Results|Timing|Validation Timing|Performance Metrics):\s*$"
)
_NEMO_BULLET = re.compile(rf"^\s*[•·*-]\s+([^:]{{1,80}}):\s+({_NUMBER})\s*(%|[A-Za-z][\w/]*)?(?=[\s(]|$)")
_NEMO_PREFIX = {
    "Training Results": "train",
    "Validation Results": "validation",
    "Timing": "timing/train",
    "Validation Timing": "timing/validation",
    "Performance Metrics": "performance",
}
# Labels of its blocks -> what its own logger calls them; the others keep a name made of the label.
_NEMO_NAMES = {
    "train/Generation KL Error": "train/gen_kl_error",
    "train/Avg Reward": "train/reward",
    "train/Mean Generation Length": "train/mean_gen_tokens_per_sample",
    "validation/Validation loss": "validation/val_loss",
    "validation/Average response length": "validation/avg_length",
}


@lru_cache(maxsize=512)
def _nemo_name(section: str, label: str, unit: str | None) -> str:
    name = f"{section}/{_slug(label)}"
    if unit and not section.startswith("timing"):  # those are seconds, by their own name
        name += f"_{_slug('percent' if unit == '%' else unit)}"
    return _NEMO_NAMES.get(f"{section}/{label}", name)


def _nemo_rows(segments: Segments, tally: _Tally) -> Iterator[Row]:
    """NeMo-RL's blocks under the header of a step; a row is all that stands between two headers.

    The step of a header counts within the epoch, and its total is then the steps of an epoch.
    """
    row: Row = {}
    epoch, section = 1, ""
    for number, text in segments:
        if len(text) > 1_000:
            continue
        header = _NEMO_HEADER.search(text) if "===== " in text else None
        if header is not None:
            if _measures(row):
                yield row
            what, done, total = header.group(1), int(header.group(2)), int(header.group(3))
            if what == "Epoch":
                epoch, row = done, {}
            else:
                row = {"step": (epoch - 1) * total + done}
            section = ""
            continue
        titled = _NEMO_SECTION.match(_bare(text)) if text.rstrip().endswith(":") else None
        if titled is not None:
            section = _NEMO_PREFIX[titled.group(1)]
            if section == "train" and "train/loss" in row:  # no header since the last block
                yield row
                row = {}
            continue
        if not section or ":" not in text:
            continue
        bullet = _NEMO_BULLET.match(text) or _NEMO_BULLET.match(_bare(text))
        if bullet is None or len(row) > MAX_CELLS:
            continue
        label, figure, unit = bullet.groups()
        row[_nemo_name(section, label, unit)] = _figure(figure)
        tally.hold(number)
    if _measures(row):
        yield tally.without_torn_end(row)


_BAR = re.compile(r"(?:^|[|:\s])(\d{1,12})/(\d{1,12}) \[[^\[\]]{3,60}?, ([\w/. @-]+=[^\[\]]*)\]")
_BAR_PAIR = re.compile(rf"([A-Za-z_][\w/.@ -]{{0,60}}?)=\s*({_NUMBER})(%?)(?:, |$)")
_EVALUATES = re.compile(r"(?i)\b(?:eval|valid|test|predict)")


def _bar_rows(segments: Segments, tally: _Tally) -> Iterator[Row]:
    """What a tqdm bar says of each step, `12/240 [00:10<03:00, 1.20it/s, loss=0.53]`: the last word on each.

    A bar that begins again over as many steps is the next epoch, whose steps count on.
    """
    main: tuple[str, int] | None = None
    pending: Row | None = None
    begun = last = others = 0
    for number, text in segments:
        if "=" not in text or "/" not in text:
            continue
        for found in _BAR.finditer(text):
            label = re.sub(r"\d+(?:\.\d+)?%?|\|.*", "", text[max(0, found.start(1) - 200) : found.start(1)]).strip()
            pairs = list(_BAR_PAIR.finditer(found.group(3)))
            cells = {name.strip() + (" (%)" if percent else ""): _figure(n) for name, n, percent in _groups(pairs)}
            whole = sum(len(pair.group()) for pair in pairs) == len(found.group(3))
            if not whole or not _measures(cells) or _EVALUATES.search(label):
                continue
            done, total = int(found.group(1)), int(found.group(2))
            main = main or (label, total)
            if main != (label, total):
                others += 1
                continue
            tally.hold(number)
            if done < last:
                begun += total
            if pending is not None and done != last:
                yield pending
            last, pending = done, {"step": begun + done, **cells}
    if pending is not None:
        yield pending
    if others:
        tally.remarks.append(
            f"Another progress bar with metrics was drawn {count_of(others, 'time')}; it was left out."
        )


def _groups(pairs: list[re.Match[str]]) -> Iterator[tuple[str, str, str]]:
    return ((pair.group(1), pair.group(2), pair.group(3)) for pair in pairs)


# ---------------------------------------------------------------------- tables as text

_GAPS = re.compile(r"\t|\s{2,}")
_RULE = re.compile(r"^[\s|+:=─━┃│╇┼┏┓└┘├┤┡┩┴┬-]+$")


def cells_of(text: str) -> list[str]:
    """The cells of a line of a table: separated by bars, tabs, or two and more spaces."""
    text = text.strip("\r\n")
    if text.count("|") >= 2 or "│" in text or "┃" in text:
        return [cell.strip() for cell in re.split(r"[|│┃]", text.strip().strip("|│┃"))]
    return [cell.strip() for cell in _GAPS.split(text.strip(" "))]


def is_header(cells: Sequence[str]) -> bool:
    """Whether these are the names of a table of metrics: no number, one that counts, one that measures."""
    if not 2 <= len(cells) <= 200 or any(not cell or len(cell) > 100 or cell[0] not in _LETTERS for cell in cells):
        return False
    clock, measured, _ = _evidence(tuple(cells))
    return clock and bool(measured) and len(set(cells)) == len(cells)


_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")


FRAME_REMARK = "In a printed data frame NaN stands for what was not logged as well; it was taken for that."


def table_row(header: Sequence[str], cells: Sequence[str]) -> Row | None:
    """A line of a table under its header; None if it does not belong to it. Cells without a number are left out."""
    frame = is_frame_line(header, cells)
    if frame:
        cells = cells[1:]
    if len(cells) != len(header):
        return None
    row: Row = {}
    for name, cell in zip(header, cells):
        if cell.lower() in _NOT_LOGGED or (frame and cell == "NaN"):
            continue
        plain = cell.replace(",", "") if re.fullmatch(_NUMBER, cell) else cell
        row[name] = _value(plain)
    return row if any(_is_number(value) for value in row.values()) else None


def is_frame_line(header: Sequence[str], cells: Sequence[str]) -> bool:
    """Whether a line is one of a pandas data frame: with an index before the cells that have names."""
    return len(cells) == len(header) + 1 and cells[0].isdigit()


def _table_rows(segments: Segments, tally: _Tally) -> Iterator[Row]:
    """`Step  Training Loss  Validation Loss` and the lines under it; a step or epoch stands in each."""
    header: list[str] = []
    clocks: list[str] = []
    for number, text in segments:
        if len(text) > 20_000 or not text.strip():
            continue
        if header and _RULE.match(text):
            continue
        if header and any(ch.isdigit() for ch in text):
            row = table_row(header, cells := cells_of(text)) or table_row(header, cells := text.split())
            if row is not None and any(_is_number(row.get(name)) for name in clocks):
                if "NaN" in cells and is_frame_line(header, cells) and FRAME_REMARK not in tally.remarks:
                    tally.remarks.append(FRAME_REMARK)
                tally.hold(number)
                yield tally.without_torn_end(row)
                continue
        lower = text.lower()
        if "step" in lower or "epoch" in lower or "iter" in lower:
            cells = cells_of(_bare(text))
            if is_header(cells):
                header, clocks = cells, [name for name in cells if name.lower().rsplit("/", 1)[-1] in _CLOCKS]
                continue
        header = []


def _is_plain_csv(lines: Sequence[str]) -> bool:
    """Whether the file is nothing but a table with tabs, which is the business of the reader of CSV."""
    filled = [line for line in islice(lines, 200) if line.strip()]
    return bool(filled) and len({line.count("\t") for line in filled}) == 1 and "\t" in filled[0]


# ---------------------------------------------------------------------- home-made lines

_STEP_WORD = re.compile(
    r"(?<![\w/.-])(?:global[ _]?|train[ _]?|training[ _]?)?(?:step|iter|iteration|update)s?\b\s*[:=#]?\s*\[?\s*"
    r"(\d[\d,]{0,15})(?:\s*(?:/|of)\s*(\d[\d,]{0,15}))?\]?(?![\w.%]\w|\w)",
    re.IGNORECASE,
)
_EPOCH_WORD = re.compile(
    r"(?<![\w/.-])epoch\b\s*[:=#]?\s*\[?\s*(\d{1,9}(?:\.\d+)?)(?:\s*(?:/|of)\s*\d[\d.]*)?\]?(?![\w%])", re.IGNORECASE
)
# What a loop that names no step counts: `[20/500]`, or the batch of an epoch.
_COUNTER = re.compile(r"(?<![^\s\])])\[\s*(\d[\d,]{0,15})\s*/\s*(\d[\d,]{0,15})(?:\s*\(\d+(?:\.\d+)?%\))?\s*\]")
_BATCH_WORD = re.compile(_STEP_WORD.pattern.replace("step|iter|iteration|update", "batch"), re.IGNORECASE)
_UNITS = (
    r"ms|s|sec|secs|seconds|min|mins|h|%|GiB|GB|MiB|MB|tok/s|toks/s|tokens/s|tokens/sec|tokens|samples/s|samples/sec"
    r"|it/s|it/sec|s/it|steps/s|s/step|ms/step|TFLOPS|TFLOP/s|k|M"
)
_NAME = r"[A-Za-z_][\w/.@%#-]*"
_MARKED = re.compile(
    rf"({_NAME}(?: [A-Za-z_(][\w/.@()%#-]*){{0,4}})[:=](?:({_NUMBER})(?: ?({_UNITS}))?|(n/a|None|-))(?: ?\([^()]*\))?"
    r"(?=\s|$)\s*"
)
_SPACED = re.compile(
    rf"({_NAME}(?: {_NAME})?) +({_NUMBER})(?: ?({_UNITS})(?!\s+[-+.\d]))?(?: ?\([^()]*\))?(?=\s|$)\s*"
)
# A speed or a time without a name: `0.8s/it`, `00:12:03`, `ETA 3:20`.
_UNNAMED = re.compile(
    rf"(?:{_NUMBER})[kM]? ?(?:{_UNITS})|(?:(?:eta|elapsed|remaining|time)[: ] ?)?\d{{1,3}}(?::\d\d){{1,2}}",
    re.IGNORECASE,
)
_TENSOR = re.compile(rf"\btensor\(\s*({_NUMBER})\s*(?:,[^()]*)?\)")
_MARKS = re.compile(r"[ \t]{0,8}([:=])[ \t]*")
_FIELDS = re.compile(r"\s*[|;]\s*|,\s+|,$|,(?=[A-Za-z_])|\s{2,}|\t|\s+[-–]\s+")


def _pair_rows(segments: Segments, tally: _Tally) -> Iterator[Row]:
    """`step 100 | loss 2.31 | lr 1e-4`, `[20/500] loss=0.5, acc=0.9`: only where all beside the step is pairs.

    Steps that begin anew in each epoch count on.
    """
    before: Row = {}
    begun = 0
    for number, text in segments:
        made = _pairs(text)
        if made is None:
            continue
        row, total = made
        step, epoch = row.get("step"), row.get("epoch")
        if step is not None:
            if epoch is not None and epoch > before.get("epoch", epoch) and step <= before["step"]:
                begun += total if total is not None else before["step"]
            if "epoch" in row:
                before = {"step": step, "epoch": epoch}
            row["step"] = step + begun
        tally.hold(number)
        yield tally.without_torn_end(row)
    if begun:
        tally.remarks.append("Steps begin anew in each epoch there; they were counted on.")


def _pairs(text: str) -> tuple[Row, int | None] | None:
    """The row of a line, and how many steps it says there are; None if it is not made of pairs."""
    if len(text) > 5_000:
        return None
    if "tensor(" in text:
        text = _TENSOR.sub(r"\1", text)
    step = _STEP_WORD.search(text) or _COUNTER.search(text) or _BATCH_WORD.search(text)
    epoch = _EPOCH_WORD.search(text)
    began = step or epoch
    if began is None:
        return None
    row: Row = {}
    total = None
    if step is not None:
        row["step"] = int(step.group(1).replace(",", ""))
        total = int(step.group(2).replace(",", "")) if step.group(2) else None
    end = began.end()
    if epoch is not None and (
        step is None or epoch.start() < step.start() or not text[end : epoch.start()].strip(" ,|")
    ):
        row["epoch"] = _value(epoch.group(1))
        end = max(end, epoch.end())
    if (rest := _plain(text[end:])) == "":
        rest = _plain(_bare(text[: began.start()]))  # the step stands last
    for piece in _FIELDS.split(rest):
        if not piece or _UNNAMED.fullmatch(piece):
            continue
        for name, number, unit in _pairs_of(piece):
            if name in row or not name:
                return None
            if number is not None:
                row[f"{name} ({unit})" if unit else name] = _figure(number)
    return (row, total) if _measures(row) else None


def _plain(text: str) -> str:
    """Fields of names and values, without blanks around `:` and `=`."""
    return _MARKS.sub(r"\1", text).strip(" \t:|,;-–>([{}])")


def _pairs_of(piece: str) -> Iterator[tuple[str, str | None, str | None]]:
    """(name, number, unit) of each pair in a field; an empty name where it is not made of pairs."""
    at = 0
    while at < len(piece):
        pair = _MARKED.match(piece, at) or _SPACED.match(piece, at)
        if pair is None:
            yield "", None, None
            return
        yield pair.group(1), pair.group(2), pair.group(3)
        at = pair.end()


# Most specific first.
STYLES: tuple[Style, ...] = (
    Style(
        "openrlhf",
        "OpenRLHF's lines `Global step N: {…}`",
        _each("lobal step ", _dict_after(r"[Gg]lobal step (\d{1,15})[^{:]{0,40}:\s*"), True),
    ),
    Style(
        "pipeline_rl",
        "PipelineRL's lines `Completed steps N: {…}`",
        _each("Completed steps ", _dict_after(r"Completed steps (\d{1,15}):\s*"), True),
    ),
    Style("verl", "verl's lines `step:N - name:value`", _each("step:", _verl_rows, False)),
    Style("prime_rl", "PRIME-RL's lines `Step N | …`", _each("Step ", _prime_rows, False)),
    Style("torchtune", "torchtune's lines `Step N | name:value`", _each("Step ", _torchtune_rows, False)),
    Style("nemo_rl", "NeMo-RL's blocks of results", _nemo_rows),
    Style("dict", "dicts of metrics, as transformers and TRL print them", _each("{", _dict_rows, True)),
    Style("oat", "dicts of metrics printed over several lines, as OAT does", _pretty_rows),
    Style("bar", "what progress bars say of each step", _bar_rows, 0.25),
    Style("table", "tables as text", _table_rows, 0.25),
    Style("pairs", "lines of names and values after a step", _pair_rows, 0.25),
)
