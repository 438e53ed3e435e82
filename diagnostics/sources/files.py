"""Files as bytes and lines: opened, unpacked, decoded, and refused with one sentence where they are no logs.

Nothing is unpickled or executed.
"""

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

MAX_LINE = 10 * 1024 * 1024  # bytes; a longer line is no row of metrics
MAX_BYTES = 64 * 1024**3  # of one file, after decompression
HEAD = 2 * 1024 * 1024  # bytes that are looked at to tell what a file is

Row = dict[str, Any]

# How files begin that people hand over by mistake, and what to do instead.
_PICKLE = "is a pickle (training_args.bin, a checkpoint); it is never opened. Give its settings with --config"
_PACKED = "is compressed in a way that is not read here; unpack it first"
_MAGIC = [
    *((bytes((0x80, protocol)), _PICKLE) for protocol in range(2, 6)),
    (b"PK\x03\x04", "is a zip archive or a torch checkpoint, not a log of metrics"),
    (b"\x1f\x8b", "is compressed twice; unpack it first"),
    *((magic, _PACKED) for magic in (b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh91AY&SY", b"7z\xbc\xaf\x27\x1c")),
    (b"PAR1", "is a Parquet file; export it as CSV"),
    (b"ARROW1", "is an Arrow file; export it as CSV"),
    (b"\x89HDF\r\n", "is an HDF5 file; export it as CSV"),
    (b"SQLite format 3", "is a database that is not MLflow's; export the metrics as CSV"),
    (b"GGUF", "holds model weights, not a log of metrics"),
    *((magic, "is an image, not a log of metrics") for magic in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")),
    (b"%PDF-", "is a PDF, not a log of metrics"),
    *((bom, "is UTF-32 text; save it as UTF-8") for bom in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
]


class UnreadableLog(ValueError):
    """A file that cannot be read as a log. The message is one sentence that names the file, and the line if any."""


def open_bytes(path: Path) -> IO[bytes]:
    try:
        # A pipe would be waited for, and cannot be read twice.
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UnreadableLog(f"{path}: is no regular file (a pipe or a device); save what it gives as a file.")
        handle = path.open("rb")
        if handle.read(2) == b"\x1f\x8b":
            handle.close()
            return cast(IO[bytes], gzip.open(path, "rb"))
        handle.seek(0)
        return handle
    except FileNotFoundError:
        raise UnreadableLog(f"{path}: there is no such file.") from None
    except IsADirectoryError:
        raise UnreadableLog(f"{path}: is a directory without a log that is known here.") from None
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be opened ({error.strerror or error}).") from None
    except UnreadableLog:
        raise
    except ValueError as error:
        raise UnreadableLog(f"{path}: is no name of a file ({error}).") from None


def is_packed(path: Path) -> bool:
    """Whether a file is compressed by gzip."""
    with path.open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


def lines_of(path: Path, notes: list[str], strict: bool = True) -> Iterator[tuple[int, str, bool]]:
    """(number, text, whether it ends with a newline) of each line; numbers begin at 1.

    Where `strict`, a line that is not UTF-8 raises; else what cannot be decoded is replaced.
    """
    with open_bytes(path) as handle:
        stream: IO[bytes] = handle
        try:
            head = handle.read(4)
            handle.seek(0)
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError):
            raise UnreadableLog(f"{path}: is a damaged gzip file.") from None
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # e.g. a PowerShell redirection
            stream = cast(IO[bytes], _Recoded(handle))
        total = 0
        number = 0
        while True:
            number += 1
            try:
                line = stream.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                notes.append(f"The compressed file ends early, at line {number}; what came before was read.")
                return
            except OSError as error:
                raise UnreadableLog(f"{path}: line {number} cannot be read ({error.strerror or error}).") from None
            if not line:
                return
            total += len(line)
            if len(line) > MAX_LINE and (strict or b"\r" not in line):  # a progress bar redraws itself after "\r"
                raise UnreadableLog(f"{path}: line {number} is longer than {MAX_LINE // 2**20} MiB, which no row is.")
            if total > MAX_BYTES:
                raise UnreadableLog(f"{path}: is larger than {MAX_BYTES // 2**30} GiB.")
            ended = line.endswith(b"\n")
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line = line[len(codecs.BOM_UTF8) :]
            if b"\0" in line and not line.strip(b"\0\r\n \t"):
                line = b""  # what a crash of the machine leaves of a line that was never written
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                if not strict:
                    decoded = line.decode("utf-8", errors="replace")
                elif not ended:  # cut within a character
                    decoded = line[: error.start].decode("utf-8")
                else:
                    raise UnreadableLog(
                        f"{path}: line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at {error.start})."
                    ) from None
            yield number, decoded.rstrip("\r\n"), ended


class _Recoded:
    """A UTF-16 stream as UTF-8 lines."""

    def __init__(self, handle: IO[bytes]):
        self._text = io.TextIOWrapper(handle, encoding="utf-16", errors="replace", newline="\n")

    def readline(self, size: int) -> bytes:
        return self._text.readline(size).encode()


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of change, which differ when a file does.

    Raises:
        UnreadableLog: there is no such file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be opened ({error.strerror or error}).") from None
    return found.st_size, found.st_mtime_ns


def head_of(path: Path, size: int = HEAD) -> bytes:
    """The beginning of a file, unpacked.

    Raises:
        UnreadableLog: there is no such file, or it cannot be unpacked.
    """
    with open_bytes(path) as handle:
        parts, missing = [], size
        try:
            while missing and (part := handle.read(min(missing, 65536))):
                parts.append(part)
                missing -= len(part)
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError):
            if not parts:
                raise UnreadableLog(f"{path}: is a damaged gzip file.") from None
        return b"".join(parts)


def text_of(path: Path, head: bytes) -> str:
    """The head of a text file as text.

    Raises:
        UnreadableLog: it is empty, binary, or of a kind that is known not to be a log.
    """
    for magic, why in _MAGIC:
        if head.startswith(magic):
            raise UnreadableLog(f"{path}: {why}.")
    if head[257:262] == b"ustar":
        raise UnreadableLog(f"{path}: is a tar archive; unpack it and give the log in it.")
    if not head.strip(b"\0 \r\n\t"):
        raise UnreadableLog(f"{path}: is empty.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return head.decode("utf-16", errors="ignore")
    if b"\0" in head.split(b"\n")[0]:
        raise UnreadableLog(f"{path}: is a binary file, not a log of metrics.")
    return head.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="ignore")


# What a user can do about a file in which nothing was found.
FORMS = "known are JSON lines, CSV, printed dicts, and lines such as `step 10 loss 2.31`"


def count_of(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[str], shown: int = 12) -> str:
    """The first names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(str(name)[:80] for name in names[:shown]) + (f" and {more} more" if more > 0 else "")
