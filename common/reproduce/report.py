"""The page: report.md and .html of one run directory, tables.md and .html of a grid of them."""

import base64
import html
import pathlib
import re

import matplotlib.pyplot as plt
from markdown_it import MarkdownIt

from common.files import stage, write
from common.files.read import read_jsonl
from common.reproduce import claims, figures, rates, sizes, tables
from common.reproduce.results import MAIN_ALPHA, place
from common.reproduce.runs import MAIN, Measured, Runs

NOTES = {
    "problems": "One training seed. Errors are standard errors over test problems, each answered "
    "several times. Differences are paired by problem, with two standard errors on either side. "
    "They do not cover what another training seed would change.",
    "seeds": "Means over training seeds {seeds} (or as many as the column says) ± standard error "
    "over seeds. Differences are paired by seed, with Student's 95% interval. The test problems "
    "are the same for all seeds: the intervals do not cover what other problems would change.",
}
WORDS = pathlib.Path(__file__).with_name("words.md").read_text(encoding="utf-8")
FIGURES = {  # title -> name of the file, and what draws it
    "Accuracy by learning rate": ("rates", rates.accuracy),
    "The gain of a jump by learning rate": ("rates_gain", rates.gain),
    "The gain of a jump by its held-out cosine": ("rates_cosine", rates.against_cosine),
    "Accuracy by RL step": ("accuracy", figures.accuracy),
    "Reward and response length": ("training", figures.training),
    "Fig. 2: how much of the update is rank 1": ("fig2_energy_ratio", figures.energy),
    "Fig. 3: a straight line through the trajectory": ("fig3_linear_fit", figures.linear_fit),
    "The predictors' training loss (Eq. 9)": ("predictor_loss", figures.predictor_loss),
    "Fig. 5: where the time goes": ("fig5_cost", sizes.cost),
    "Fig. 6: how far to jump": ("fig6_alpha", figures.alpha_sweep),
    "Fig. 7: GPQA, and what training costs": ("fig7_gpqa", sizes.gpqa),
}
KEYS = ("seed", "run", "policy", "label", "method", "alpha", "steps", "accuracy", "error", "n")
KEYS += ("length", "seconds")  # in results.json
FRAME = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
SHOWN = 8  # problems with their answers
ANSWER = {"problem": int, "run": int, "prompt": str, "response": str, "answer": str, "score": float}


def page(runs: Runs, made_with: str) -> str:
    """The whole page as markdown; draws the figures into `figures` in the page's folder."""
    at = rates.columns(runs)
    claimed = "The paper's claims" + ("" if len(runs.seeds) > 1 else ", in one training run")
    verdicts = {f"{claimed}, at learning rate {rate:g}": run for rate, run in at.items()}
    verdicts = verdicts or {claimed: runs}
    after = f"what {runs.total} RL steps come to" if runs.total else "what was measured"
    parts = {
        "What the learning rate is worth, and the jump at each": rates.page(runs),
        f"Tables 3 and 4: {after}": tables.main_table(runs),
        "Beside the paper's numbers": tables.beside_paper(runs),
        "Right after the jump": tables.jumps_table(runs),
        "Every task": tables.by_task(runs),
        **{title: claims.page(one) for title, one in verdicts.items()},
        "Table 5: what the jump needs": tables.variants(runs, "variant", tables.RECIPES),
        "Table 6: other algorithms": tables.table6(runs),
        "Other settings": tables.variants(runs, "recipe and setting", ("weighted", "next-aligned")),
        "Is the predictor worth its place?": tables.backtests(runs),
    }
    for title, (name, draw) in FIGURES.items():
        if figure := draw(runs):
            write.save_figure(runs.root / "figures" / f"{name}.png", figure)
            plt.close(figure)
            parts[title] = f"![{title}](figures/{name}.png)"
    mean = "Accuracy is the plain mean of" if len(runs.tasks) > 1 else "Accuracy is that on"
    note = NOTES[runs.over].format(seeds=", ".join(map(str, runs.seeds)))
    text = [f"# Results of {runs.root.name}", made_with, *filter(None, [rates.sentence(runs)])]
    main = [f" Where no learning rate is named, it is {r:g}." for r in at if at[r].name == MAIN]
    text += [note, f"{mean} {', '.join(runs.tasks)}.{''.join(main)}"]
    if runs.left_out:
        lines = "\n".join(f"* {line}" for line in runs.left_out)
        text.append(f"Only what was made alike is compared. Left out of all tables:\n\n{lines}")
    text += [f"## {title}\n\n{body}" for title, body in parts.items() if body]
    return "\n\n".join([*text, WORDS])


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
    later = [m for m in runs.ended() if m.policy.split("/")[1] == jump.policy.rpartition("/")[2]]
    columns = {}  # heading -> problem -> row of stage 6
    for m in filter(None, [runs.get("backbone"), runs.before, jump, *later, *runs.plain()[-1:]]):
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


def write_page(runs: Runs, made_with: str, path: pathlib.Path, results: pathlib.Path) -> str:
    """Writes the page twice, and its numbers as JSON; returns what the console shows."""
    write.write_json(results, [{key: getattr(r, key) for key in KEYS} for r in runs.all])
    write.write_text(path, text := page(runs, made_with))
    write.write_text(path.with_suffix(".html"), whole(text, runs))
    left = "".join(f"left out: {line}\n" for line in runs.left_out)
    return f"\n{tables.main_table(runs)}\n\n{left}report: {path}, figures beside it, and .html"


def write_run(run: pathlib.Path) -> str:
    """The page of one run directory: report.md, report.html, figures/, eval/results.json."""
    versions = ", ".join(f"{name} {version}" for name, version in stage.versions().items())
    results = run / "eval" / "results.json"
    return write_page(Runs(run), f"Made with {versions}.", run / "report.md", results)
