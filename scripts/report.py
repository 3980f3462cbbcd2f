"""Write one HTML page about one run or several: curves, differences, samples, machine. It loads nothing.

python -m scripts.report RUN               writes RUN/report.html, as every run does itself
python -m scripts.report RUN RUN …         compares them, in report.html
python -m scripts.report SWEEP             compares the runs of a sweep's folder, in SWEEP/report.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.parser import parser_of
from training.report import RunReader, runs_at, write_page
from training.terminal import say_error, secure


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where the command cannot work; 130 after Ctrl-C."""
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or the folder of a sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page")
    options = parser.parse_intermixed_args(arguments)
    out = options.out or (options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html"))
    try:
        folders = list(dict.fromkeys(folder for path in options.runs for folder in runs_at(path)))
        write(out, [RunReader(folder).read() for folder in folders])
    except ValueError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"{error.filename} cannot be read: {error.strerror}; make it readable")
    except KeyboardInterrupt:
        return 130
    print(out)
    return 0


def write(out: Path, runs: list[dict[str, Any]]) -> None:
    """Raises ValueError where the page cannot be written."""
    try:
        write_page(out, runs)
    except OSError as error:  # which names the file that the page is written to first
        raise ValueError(f"{out} cannot be written: {error.strerror}; name another place with --out") from error


def refuse(why: str) -> int:
    say_error(why)
    return 2


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
