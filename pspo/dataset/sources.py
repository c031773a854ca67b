"""The real sets: where each comes from and how one of its rows becomes a problem."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pspo.base.schema import ConfigError
from pspo.dataset import files
from pspo.dataset.files import Row
from pspo.dataset.problem import Problem, worked
from pspo.host import hub


@dataclass(frozen=True)
class Parsed:
    """A row that was understood; ``key`` names it inside its split where the source has names of its own."""

    question: str
    answer: str
    solution: str = ""
    key: str = ""


@dataclass(frozen=True)
class Source:
    """One data set: its repository on the Hub, and how its files and rows are read."""

    name: str
    parse: Callable[[Row], Parsed]
    columns: str  # names that ``parse`` reads; every further column goes to ``Problem.extra``
    repo: str = ""  # on the Hub; "" for a user's own files
    subset: str = ""  # the folder in the repository whose files are wanted
    whole: str = ""  # a file of the authors' that holds the entire set, which is then for testing
    lone: str = "test"  # the split of such a file, and of any file whose name tells none
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})  # theirs -> ours

    def find(self, path: Path) -> dict[str, list[Path]]:
        """The files under ``path``, by their split. Raises ConfigError."""
        with files.readable(path):
            return files.find(path, subset=self.subset, whole=self.whole, lone=self.lone)


def gsm8k(row: Row) -> Parsed:
    """The answer follows ``####``; calculator marks ``<<48/2=24>>`` go, as a policy should not learn to write them."""
    working, mark, answer = row.text("answer").rpartition("####")
    if not mark or not answer.strip():
        raise row.error("answer must end in '#### <number>'")
    answer = answer.strip().replace(",", "")
    return Parsed(row.text("question"), answer, worked(re.sub(r"<<.*?>>", "", working), answer))


def svamp(row: Row) -> Parsed:
    """Body and question joined by a space, as in the Hub's question_concat, so that both sources give one prompt."""
    question = f"{row.text('Body')} {row.text('Question')}"
    return Parsed(question, re.sub(r"\.0+$", "", row.scalar("Answer")), key=row.text("ID"))


def asdiv(row: Row) -> Parsed:
    """``9 (apples)`` becomes 9 and ``5 (cm); 6 (cm)`` becomes ``5; 6``; names, times and ratios stay as they are."""
    answer = re.sub(r"\s+\([^()]*\)", "", row.text("answer"))
    return Parsed(f"{row.text('body')} {row.text('question')}", answer)


def math500(row: Row) -> Parsed:
    """The gold answer is LaTeX, as given."""
    answer = row.scalar("answer")
    solution = worked(row.text("solution"), answer) if row.has("solution") else ""
    return Parsed(row.text("problem"), answer, solution, row.text("unique_id").removeprefix("test/"))


def hendrycks(row: Row) -> Parsed:
    r"""The gold answer is what the solution's last ``\boxed`` or ``\fbox`` holds."""
    solution = row.text("solution")
    answer = boxed(solution)
    if not answer:
        raise row.error("solution must hold its answer in \\boxed{...}")
    return Parsed(row.text("problem"), answer, worked(solution, answer))


def jsonl(row: Row) -> Parsed:
    """A user's own line: question or prompt, answer, and where given solution and id."""
    answer = row.scalar("answer")
    if "####" in answer:
        raise row.error("answer must be the final answer alone; put the working into solution")
    solution = worked(row.text("solution").partition("####")[0], answer) if row.has("solution") else ""
    return Parsed(row.text("question", "prompt"), answer, solution, row.scalar("id") if row.has("id") else "")


def boxed(text: str) -> str:
    r"""What the last ``\boxed{...}``, ``\boxed ...`` or ``\fbox{...}`` of a LaTeX text holds; "" for none."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not found:
        return ""
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[$\s]", rest, maxsplit=1)[0].rstrip(".,")
    depth = 0
    for i, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1:i].strip()
    return ""


OWN = {split: split for split in ("train", "validation", "test")}
TEST = OWN | {"validation": "test"}
MATH500 = Source(
    "math500", math500, "problem answer solution unique_id", "HuggingFaceH4/MATH-500", splits={"test": "test"}
)
SETS = {
    "gsm8k": [Source("gsm8k", gsm8k, "question answer", "openai/gsm8k", subset="main")],
    "svamp": [Source("svamp", svamp, "Body Question Answer ID", "ChilleD/SVAMP", whole="SVAMP.json")],
    "asdiv": [Source("asdiv", asdiv, "body question answer", "EleutherAI/asdiv", whole="ASDiv.xml", splits=TEST)],
    "math500": [MATH500],
    # the official 7500 training problems; MATH-500 was drawn from the official test problems
    "math": [
        Source("math", hendrycks, "problem solution", "EleutherAI/hendrycks_math", splits={"train": "train"}),
        MATH500,
    ],
    "jsonl": [Source("jsonl", jsonl, "question prompt answer solution id", lone="train", splits=OWN)],
}


def locate(name: str, path: str | None) -> list[tuple[Source, dict[str, list[Path]]]]:
    """The files of each split, by our names, for each source of data set ``name``. Raises ConfigError."""
    located = []
    for source in SETS[name]:
        place = folder(source, name, path)
        found = source.find(place)
        ours = {source.splits[split]: paths for split, paths in found.items() if split in source.splits}
        if not ours:
            wanted = " or ".join(source.splits)
            raise ConfigError(f"{place} holds no {wanted} file, only {', '.join(found)}; dataset={name} needs it")
        located.append((source, ours))
    return located


def folder(source: Source, name: str, path: str | None) -> Path:
    """Where the files of a source are: under ``path``, else in the hub's cache, fetched if need be. Raises ConfigError.

    Not ``datasets.load_dataset``: offline it finds only what it has itself prepared before, not what ``hf download``
    or a copied cache holds, and without a network it retries for 23 s (datasets 5.2.0).
    """
    if path is not None:  # MATH stands in two repositories, so in two folders
        return Path(path) / source.repo.partition("/")[2] if len(SETS[name]) > 1 else Path(path)
    asked, instead = f"dataset={name}", "set dataset.path=<folder with the files>"
    patterns = ["*.parquet", "*.jsonl"]
    return hub.locate(source.repo, patterns, source.find, asked=asked, kind="dataset", instead=instead)


def read(source: Source, split: str, paths: list[Path]) -> list[Problem]:
    """The problems of one split, with ids ``<source>/<split>/<key or index>``. Raises ConfigError."""
    problems: dict[str, Problem] = {}
    for row in (row for path in paths for row in files.read(path)):
        parsed = source.parse(row)
        name = f"{source.name}/{split}/{parsed.key or len(problems)}"
        if name in problems:
            raise row.error(f"id {parsed.key or len(problems)} stands here for the second time; ids must be unique")
        extra = {column: value for column, value in row.fields.items() if column not in source.columns.split()}
        problems[name] = Problem(name, parsed.question, parsed.answer, parsed.solution, extra)
    if not problems:
        raise ConfigError(f"{paths[0]} has no rows; put at least one there, or remove it")
    return list(problems.values())


def cached(source: Source) -> Path:
    """The snapshot of a repository in the hub's cache; no network. Raises ConfigError where there is none."""
    try:
        return Path(snapshot_download(source.repo, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ConfigError(f"dataset {source.repo} is not in the cache; run `python -m pspo.prefetch`") from error
