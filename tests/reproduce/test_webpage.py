"""report.html: one file with nothing outside it, answers side by side, tables that sort."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from test_grid import record, share

from common.reproduce import report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CLICK = '<script>document.querySelectorAll("th")[{column}].click()</script>'


class Page(html.parser.HTMLParser):
    """The cells of each table, and what the page would load."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.loads, self.in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for key, value in attributes if key in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def test_the_page_is_one_file_with_every_figure_and_four_answers_to_a_problem(finished_run):
    found = Page((finished_run / "report.html").read_text())
    markdown = (finished_run / "report.md").read_text()
    assert len(found.loads) == markdown.count("](figures/") > 5
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in found.loads)
    *others, (heading, first, *_) = found.tables
    assert len(others) == markdown.count("\n|---|")
    names = ["problem", "Backbone", "GRPO with LoRA, step 6"]
    names += ["NExt (aligned), right after the jump", "NExt (aligned), step 8"]
    assert heading == [*names, "GRPO with LoRA, step 8"]
    policies = ("backbone", "train__step_0006", "extrapolated__next-aligned_alpha1.5")
    rows = [(finished_run / "eval" / p / "test.jsonl").read_text() for p in policies]
    wanted = [json.loads(text.splitlines()[0]) for text in rows]
    assert first[0] == f"{wanted[0]['prompt']}\n\nright: {wanted[0]['answer']}"
    assert first[1:4] == [row["response"] for row in wanted]


def test_an_answer_is_text_and_never_a_part_of_the_page(tmp_path):
    record(tmp_path, "backbone", share(50))
    row = {"problem": 0, "run": 0, "prompt": "1+1", "answer": "2", "score": 0.0}
    row["response"] = "<script>alert(1)</script><img src=x>"
    (tmp_path / "eval" / "backbone" / "test.jsonl").write_text(json.dumps(row) + "\n")
    report.write_run(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert Page(text).tables[-1][1] == ["1+1\n\nright: 2", row["response"]]
    assert text.count("<script>") == 1


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_click_on_a_heading_sorts_by_that_column(tmp_path):
    for step, right in ((1, 30), (2, 50), (10, 9)):
        record(tmp_path, f"train/step_{step:04d}", share(right), step)
    report.write_run(tmp_path)
    seen = []
    for column in (1, 4):  # RL steps, accuracy
        page = tmp_path / "clicked.html"
        page.write_text((tmp_path / "report.html").read_text() + CLICK.format(column=column))
        command = [BROWSER, "--headless", "--no-sandbox", "--dump-dom", f"file://{page}"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        seen.append([re.match(r"\d*", row[1])[0] for row in Page(shown).tables[0][1:]])
    assert seen == [["10", "2", "1"], ["2", "1", "10"]]
