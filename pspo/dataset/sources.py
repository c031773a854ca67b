"""The real data sets: the repository, the files and the rows of each."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pspo.base.schema import ConfigError
from pspo.dataset import files
from pspo.dataset.files import READERS, Row
from pspo.dataset.problem import Problem, boxed, worked
from pspo.host import hub

# train.jsonl, train-00000-of-00001.parquet and the folder train, but not train_socratic.jsonl
SPLIT = re.compile(r"(train|validation|test)(-\d+-of-\d+.*)?")


@dataclass(frozen=True)
class Source:
    """One repository of a data set, and how its files and rows are read."""

    name: str
    parse: Callable[[Row], Problem]  # with the row's own name in its split as the id, "" where it has none
    columns: str  # names that ``parse`` reads; every further column goes to ``Problem.extra``
    repo: str = ""  # on the Hub; "" for a user's own files
    subset: str = ""  # the folder of the repository that holds the wanted configuration
    whole: str = ""  # the authors' one file with the entire set
    lone: str = "test"  # the split of the file ``whole``, and of a file whose name is not that of a split
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})  # theirs -> ours

    def find(self, path: Path) -> dict[str, list[Path]]:
        """The files of each split, by our names, under ``path``, a file or a folder.

        A file belongs to a split by its own name or by that of a folder above it. Raises ConfigError where no wanted
        split is there, or a split in two formats.
        """
        with files.readable(path):
            theirs = self._find(path)
        ours = {self.splits[split]: paths for split, paths in theirs.items() if split in self.splits}
        if not ours:
            wanted = " or ".join(self.splits)
            raise ConfigError(f"{path} holds no {wanted} file, only {', '.join(theirs)}; dataset={self.name} needs it")
        return ours

    def _find(self, path: Path) -> dict[str, list[Path]]:
        formats = ", ".join(READERS)
        if path.is_file():
            if path.suffix not in READERS:
                raise ConfigError(f"dataset.path={str(path)!r}: the format must be one of {formats}")
            return {_split(Path(path.name)) or self.lone: [path]}
        if not path.is_dir():
            raise ConfigError(f"dataset.path={str(path)!r} does not exist; give the file or folder that holds the data")
        if self.whole and (path / self.whole).is_file():
            return {self.lone: [path / self.whole]}
        root = path / self.subset if (path / self.subset).is_dir() else path
        theirs: dict[str, list[Path]] = {}
        for file in sorted(root.rglob("*")):
            split = _split(file.relative_to(root))
            if split and file.suffix in READERS and file.is_file():
                theirs.setdefault(split, []).append(file)
        if not theirs:
            raise ConfigError(
                f"{path} holds no {self.whole and f'{self.whole} or '}train, validation or test file in one of the "
                f"formats {formats}; set dataset.path to a folder with such files, as in train.jsonl or "
                "main/test-00000-of-00001.parquet"
            )
        for split, paths in theirs.items():
            suffixes = sorted({file.suffix for file in paths})
            if len(suffixes) > 1:
                raise ConfigError(f"{path} holds {split} as {' and as '.join(suffixes)}; keep one of them there")
        return theirs


def gsm8k(row: Row) -> Problem:
    """The answer follows ``####``; calculator marks ``<<48/2=24>>`` go, as a policy should not learn to write them."""
    working, mark, answer = row.text("answer").rpartition("####")
    if not mark or not answer.strip():
        raise row.error("answer must end in '#### <number>'")
    answer = answer.strip().replace(",", "")
    return Problem("", row.text("question"), answer, worked(answer, re.sub(r"<<.*?>>", "", working)))


def svamp(row: Row) -> Problem:
    """Body and question joined by a space, as in the Hub's question_concat, so that both sources give one prompt."""
    question = f"{row.text('Body')} {row.text('Question')}"
    return Problem(row.text("ID"), question, re.sub(r"\.0+$", "", row.scalar("Answer")))


def asdiv(row: Row) -> Problem:
    """``9 (apples)`` becomes 9 and ``5 (cm); 6 (cm)`` becomes ``5; 6``; names, times and ratios stay as they are."""
    answer = re.sub(r"\s+\([^()]*\)", "", row.text("answer"))
    return Problem("", f"{row.text('body')} {row.text('question')}", answer)


def math500(row: Row) -> Problem:
    """The gold answer is LaTeX, as given."""
    answer = row.scalar("answer")
    solution = worked(answer, row.text("solution")) if row.has("solution") else ""
    return Problem(row.text("unique_id").removeprefix("test/"), row.text("problem"), answer, solution)


def hendrycks(row: Row) -> Problem:
    r"""The gold answer is the content of the solution's last ``\boxed{7}``, which few write as ``\boxed 7``."""
    solution = row.text("solution")
    answer = boxed(re.sub(r"(\\boxed|\\fbox)\s*([^\s${][^\s$]*?)(?=[.,]*(?:[\s$]|\Z))", r"\1{\2}", solution))
    if not answer:
        raise row.error("solution must hold its answer in \\boxed{...}")
    return Problem("", row.text("problem"), answer, worked(answer, solution))


def jsonl(row: Row) -> Problem:
    """A line of a user's own: question or prompt, answer, and optionally solution and id."""
    answer = row.scalar("answer")
    if "####" in answer:
        raise row.error("answer must be the final answer alone; put the working into solution")
    solution = worked(answer, row.text("solution").partition("####")[0]) if row.has("solution") else ""
    return Problem(row.scalar("id") if row.has("id") else "", row.text("question", "prompt"), answer, solution)


TRAIN, VALIDATION, TEST = ({split: split} for split in ("train", "validation", "test"))
MATH500 = Source("math500", math500, "problem answer solution unique_id", "HuggingFaceH4/MATH-500", splits=TEST)
MATH = Source("math", hendrycks, "problem solution", "EleutherAI/hendrycks_math", splits=TRAIN)
ASDIV = Source(
    "asdiv", asdiv, "body question answer", "EleutherAI/asdiv", whole="ASDiv.xml", splits={"validation": "test"} | TEST
)
JSONL = Source("jsonl", jsonl, "question prompt answer solution id", lone="train", splits=TRAIN | VALIDATION | TEST)
SETS = {
    "gsm8k": [Source("gsm8k", gsm8k, "question answer", "openai/gsm8k", subset="main")],
    "svamp": [Source("svamp", svamp, "Body Question Answer ID", "ChilleD/SVAMP", whole="SVAMP.json")],
    "asdiv": [ASDIV],
    "math500": [MATH500],
    "math": [MATH, MATH500],  # 7500 official training problems; MATH-500 was drawn from the official test problems
    "jsonl": [JSONL],
}


def locate(name: str, path: str | None) -> list[tuple[Source, str, list[Path]]]:
    """Source, split and files of each split of data set ``name``: under ``path``, else in the hub's cache.

    Fetched where the cache lacks them. Raises ConfigError. Not ``datasets.load_dataset``: offline it reads only a copy
    that it has itself prepared before, not the files of ``hf download`` or of a copied cache, and without a network it
    retries for 23 s (datasets 5.2.0).
    """

    def place(source: Source) -> Path:
        if path is not None:  # MATH stands in two repositories, so in two folders
            return Path(path) / source.repo.partition("/")[2] if len(SETS[name]) > 1 else Path(path)
        asked, instead = f"dataset={name}", "set dataset.path=<folder with the files>"
        patterns = ["*.parquet", "*.jsonl"]
        return hub.locate(source.repo, patterns, source.find, asked=asked, kind="dataset", instead=instead)

    return [(source, *split) for source in SETS[name] for split in source.find(place(source)).items()]


def read(source: Source, split: str, paths: list[Path]) -> list[Problem]:
    """The problems of one split, with ids ``<source>/<split>/<own name or index>``. Raises ConfigError."""
    problems: dict[str, Problem] = {}
    for row in (row for path in paths for row in files.read(path)):
        problem = source.parse(row)
        name = problem.id or str(len(problems))
        if name in problems:
            raise row.error(f"id {name} stands here for the second time; ids must be unique")
        extra = {column: value for column, value in row.fields.items() if column not in source.columns.split()}
        problems[name] = replace(problem, id=f"{source.name}/{split}/{name}", extra=extra)
    if not problems:
        raise ConfigError(f"{paths[0]} has no rows; put at least one there, or remove it")
    return list(problems.values())


def _split(relative: Path) -> str | None:
    matches = map(SPLIT.fullmatch, (relative.stem, *relative.parts[:-1]))
    return next((match[1] for match in matches if match), None)
