"""report.html: the page and its figures in one file, tables that sort, answers side by side."""

import base64
import html
import pathlib
import re

from markdown_it import MarkdownIt

from common.files.read import read_jsonl
from common.reproduce.results import MAIN_ALPHA, place
from common.reproduce.runs import Measured, Runs

FRAME = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
SHOWN = 8  # problems with their answers
ANSWER = {"problem": int, "run": int, "prompt": str, "response": str, "answer": str, "score": float}


def whole(text: str, runs: Runs) -> str:
    """The page `text`, which is markdown, as HTML. Figures come from `runs.root`."""

    def embedded(match: re.Match) -> str:
        picture = base64.b64encode((runs.root / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(figures/\w+\.png)"', embedded, body)
    title = html.escape(f"Results of {runs.root.name}")
    return FRAME.replace("{title}", title).replace("{body}", body + answers(runs))


def answers(runs: Runs) -> str:
    """What the backbone, the policy before the jump, after it and at the end say to one problem."""
    jumps = [m for m in runs.some() if m.jumped and m.alpha in (MAIN_ALPHA, None)]
    jumps = sorted((m for m in jumps if m.method != "none"), key=place)
    jump = runs.jump("next-aligned") or next(iter(jumps), Measured(""))
    later = runs.later(jump.method) if jump else Measured("")
    columns = {}  # heading -> problem -> row of stage 6
    for m in filter(None, [runs.get("backbone"), runs.before, jump, later, *runs.plain()[-1:]]):
        folder = runs.folder(next(iter(m.by_seed))) / "eval" / m.policy.replace("/", "__")
        when = "right after the jump" if m.jumped else f"step {m.steps}"
        if (path := folder / f"{runs.tasks[0]}.jsonl").is_file():
            rows = [row for row in read_jsonl(path, ANSWER) if row["run"] == 0]
            columns[m.label + (f", {when}" if m.steps else "")] = {r["problem"]: r for r in rows}
    if not columns:
        return ""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in ["problem", *columns])]
    for problem, row in sorted(next(iter(columns.values())).items())[:SHOWN]:
        asked = f"{row['prompt']}\n\nright: {row['answer']}"
        cells = [f"<td>{html.escape(asked)}</td>"]
        for found in (rows.get(problem) for rows in columns.values()):
            kind = "right" if found and found["score"] == 1 else "wrong"
            text = html.escape(found["response"]) if found else "–"
            cells.append(f'<td class="{kind}">{text}</td>')
        lines.append("".join(cells))
    rows = "".join(f"<tr>{line}</tr>\n" for line in lines)
    note = f"<p>The first problems of {runs.tasks[0]}. Green answers are right.</p>"
    return f'<h2>Answers side by side</h2>\n{note}\n<table class="answers">\n{rows}</table>\n'
