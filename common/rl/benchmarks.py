"""The table of known data sets: what each is called on the hub, and how a row of it becomes a question with its answer.

Revisions are pinned, so that a benchmark cannot change under a result. No hub was in reach when this table was written: ids, files, columns
and revisions are those that published evaluation code uses; the tests read small files in the same layout. What is known less well is said.
"""

import dataclasses
import hashlib
import types
import typing

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set on the hub. `kind` says how answers are compared (common/verifier.py): number, latex or letter."""

    hub_id: str
    file: str  # of its repository: what to fetch where the hub is out of reach
    revision: str
    split: str
    kind: str
    prompt: str = "problem"  # columns; "a.b" is the key b of column a
    answer: str = "answer"
    config: str | None = None
    choice: typing.Callable[[dict], tuple[str, str]] | None = None  # row -> (prompt, letter), instead of the two columns
    category: str | None = None  # a column whose values are tasks of their own
    dapo: bool = False  # 100 copies of each row, in a template of its own


def dapo_question(prompt: str) -> str:
    """The question without DAPO's own template, which asks for an "Answer:" line where ours asks for a box."""
    return prompt.strip().removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()


def letter_prompt(question: str, options: list[str]) -> str:
    """The question with its lettered options; the prompt template then asks for the final answer in a box."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "The final answer is the letter of the correct option."])


def gpqa(row: dict) -> tuple[str, str]:
    """GPQA lists the right option first, so the options are put in an order that depends on the question's text alone."""
    question, correct, *wrong = (
        str(row[key]).strip() for key in ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    )
    options = sorted([correct, *wrong], key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    return letter_prompt(question, options), LETTERS[options.index(correct)]


def mmlu_pro(row: dict) -> tuple[str, str]:
    """MMLU-Pro keeps its order; "N/A" only fills lists up to ten, so letters are given anew without them."""
    right = row["options"][row["answer_index"]]
    options = [option for option in row["options"] if option.strip() != "N/A"]
    return letter_prompt(row["question"].strip(), options), LETTERS[options.index(right)]


MMLU_PRO_CATEGORIES = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health"),
    *("history", "law", "math", "other", "philosophy", "physics", "psychology"),
)

SOURCES = types.MappingProxyType(
    {
        "dapo-math-17k": Source(
            "BytedTsinghua-SIA/DAPO-Math-17k",
            "data/dapo-math-17k.parquet",
            "65877096c24ffa7abc4e4fa5edb95cf3413a5674",
            "train",
            "number",  # by construction of DAPO, as far as we know
            prompt="prompt",
            answer="reward_model.ground_truth",
            dapo=True,
        ),
        "aime24": Source(
            "HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train", "number"
        ),
        # others (TIGER-Lab/AIME25) hold part I only
        "aime25": Source("math-ai/aime25", "test.jsonl", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test", "number"),
        "amc23": Source(
            "math-ai/amc23",
            "test-00000-of-00001.parquet",
            "80815d37005feb82cd7f8fbc6901d5d3eff43057",
            "test",
            "number",  # written as 27.0
            prompt="question",
        ),
        "minerva": Source(
            "math-ai/minervamath", "test.jsonl", "ee46ddc498933b1977577953250ca5c66be64f96", "test", "latex", prompt="question"
        ),
        "olymmath-en-easy": Source(
            "RUC-AIBOX/OlymMATH",
            "data/OlymMATH-EN-EASY.jsonl",
            "5f83d12e63ee3267f35044461a6cebad58ec3be1",
            "test",
            "latex",
            config="en-easy",
        ),
        "gpqa-diamond": Source(
            "Idavidrein/gpqa",  # gated: its terms have to be accepted, and HF_TOKEN set
            "gpqa_diamond.csv",
            "83022cefff930aea54f654c0b282e74b9eeda5c6",  # seen in one project only
            "train",
            "letter",
            config="gpqa_diamond",
            choice=gpqa,
        ),
        "mmlu-pro": Source(
            "TIGER-Lab/MMLU-Pro",
            "data/test-00000-of-00001.parquet",
            "b189ec765aa7ed75c8acfea42df31fdae71f97be",
            "test",
            "letter",
            choice=mmlu_pro,
            category="category",
        ),
    }
)
