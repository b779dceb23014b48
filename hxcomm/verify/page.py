"""The HTML page of a run: one file without scripts or assets. Every check is a row, every case of it a cell.

A cell's title names the case and how it ended; a cell that failed leads to its message and the command that repeats it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from hxcomm.verify.registry import CATEGORIES
from hxcomm.verify.results import FAILED, OUTCOMES, Report, Result

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #888; --pass: #3a9d5d; --fail: #c8372d; --none: #8886; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p { margin: .3rem 0; } .quiet, small { color: var(--quiet); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .35rem .6rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; } .number { text-align: right; font-variant-numeric: tabular-nums; width: 7rem; }
.cells { width: 11rem; line-height: .9; }
.cell { display: inline-block; width: .72rem; height: .72rem; margin: 1px; border-radius: 2px; }
.unsupported { background: var(--none); }
.pass { background: var(--pass); } .fail, .hang, .crash { background: var(--fail); }
.hang { background: repeating-linear-gradient(45deg, var(--fail) 0 3px, #fff9 3px 5px); }
.crash { background: radial-gradient(#fff 25%, var(--fail) 30%); }
details { margin: .3rem 0; } summary { cursor: pointer; font-size: .9rem; }
pre { font: 12.5px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0;
  padding: .5rem .7rem; border-left: 3px solid var(--fail); background: #8881; }
:target { outline: 2px solid var(--fail); outline-offset: 3px; }
"""


def html(report: Report) -> str:
    """The whole page."""
    sizes = sorted({each.ranks for each in report.results})
    api = "" if report.api == "c10d" else f", by the API of {report.api}"
    title = f"hxcomm verify: {report.backend} on {report.device}{api}"
    found = len(report.failed())
    verdict = f"{found or 'None'} of {len(report.results)} cases failed."
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{verdict}</p>",
        f'<p class="quiet">torch {escape(report.torch)}, {", ".join(map(str, sizes))} ranks, '
        f"limit of a check {report.timeout_s:g} s. Each square is one case; its title names it.</p>",
        f'<p class="quiet">{_legend()}</p>',
        _summary(report),
    ]
    for category in CATEGORIES:
        results = [each for each in report.results if each.category == category]
        if results:
            parts.append(_section(category, results, sizes))
    return "\n".join([*parts, "</body></html>", ""])


def _legend() -> str:
    meanings = {
        "pass": "passed",
        "fail": "wrong answer or error",
        "hang": "no answer within the limit",
        "crash": "a rank died",
        "unsupported": "refused on every rank, which the standard allows",
    }
    return " &nbsp; ".join(f'<span class="cell {each}"></span> {each}: {meanings[each]}' for each in OUTCOMES)


def _summary(report: Report) -> str:
    def row(name: str, category: str | None) -> str:
        counts = report.counts(category)
        numbers = "".join(f'<td class="number">{counts[each] or "·"}</td>' for each in OUTCOMES)
        return f"<tr><th>{name}</th>{numbers}</tr>"

    heads = "".join(f'<th class="number">{each}</th>' for each in OUTCOMES)
    rows = [row(_words(each), each) for each in CATEGORIES if report.counts(each)] + [row("all", None)]
    return f"<table><thead><tr><th></th>{heads}</tr></thead>{''.join(rows)}</table>"


def _section(category: str, results: Sequence[Result], sizes: Sequence[int]) -> str:
    heads = "".join(f"<th>{size} ranks</th>" for size in sizes)
    by_check: dict[str, list[Result]] = {}
    for each in results:
        by_check.setdefault(each.check, []).append(each)
    rows = "".join(_row(name, cases, sizes) for name, cases in by_check.items())
    return f"<h2>{_words(category)}</h2><table><thead><tr><th>check</th>{heads}</tr></thead>{rows}</table>"


def _row(name: str, results: Sequence[Result], sizes: Sequence[int]) -> str:
    columns = "".join(
        f'<td class="cells">{"".join(map(_cell, (each for each in results if each.ranks == size)))}</td>'
        for size in sizes
    )
    failures = "".join(_failure(each) for each in results if each.outcome in FAILED)
    said = f"{escape(name)}<br><small>{escape(results[0].says)}{_notes(results)}</small>"
    return f"<tr><td>{said}{failures}{_unsupported(results)}</td>{columns}</tr>"


def _cell(result: Result) -> str:
    title = f"{result.case} at {result.ranks} ranks: {result.outcome}"
    title += "".join(f"\n{about}: {text}" for about, text in result.notes.items())
    if result.outcome not in FAILED:
        return f'<span class="cell {result.outcome}" title="{escape(title)}"></span>'
    return f'<a class="cell {result.outcome}" href="#{_anchor(result)}" title="{escape(title)}"></a>'


def _failure(result: Result) -> str:
    arguments = result.case.partition("[")[2].rstrip("]")
    head = f"{result.outcome}{' of ' + arguments if arguments else ''} at {result.ranks} ranks"
    text = f"{result.message}\n\n{result.reproducer}"
    return f'<details id="{_anchor(result)}"><summary>{escape(head)}</summary><pre>{escape(text)}</pre></details>'


def _notes(results: Sequence[Result]) -> str:
    """What was seen beside the verdicts, with how often."""
    seen = Counter(f"{about}: {text.splitlines()[0]}" for each in results for about, text in each.notes.items() if text)
    return "".join(f"<br>{times} × {escape(note)}" for note, times in seen.most_common(6))


def _unsupported(results: Iterable[Result]) -> str:
    reasons = {each.message: None for each in results if each.outcome == "unsupported"}
    if not reasons:
        return ""
    text = escape("\n".join(reasons))
    return f"<details><summary>what is unsupported</summary><pre>{text}</pre></details>"


def _anchor(result: Result) -> str:
    return escape(f"{result.case}@{result.ranks}".replace("/", "-"))


def _words(category: str) -> str:
    return category.replace("_", " ")
