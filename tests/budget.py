"""What the code costs its readers, as numbers: python tests/budget.py [another checkout]"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = [
    *"lit_model/model.py lit_model/packing.py lit_model/attention.py lit_model/loss.py finetune/loop.py".split(),
    *"lit_model/methods/lora.py lit_model/lora.py".split(),  # there; in older checkouts
]
FOLDERS = ("lit_model", "finetune", "generate", "scripts", "tests")
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def n_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def code_tokens(path: Path) -> list[tuple[int, int]]:
    """(first line, last line) of each token that is neither a comment nor a docstring."""
    text = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docstrings |= set(range(statement.lineno, statement.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.start[0], t.end[0]) for t in tokens if t.type not in SKIPPED and t.start[0] not in docstrings]


def n_code_lines(paths: list[Path]) -> int:
    return sum(len({n for a, b in code_tokens(path) for n in range(a, b + 1)}) for path in paths)


def functions(paths: list[Path]) -> list[tuple[int, str]]:
    """(lines, name) of all functions, the longest first."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        (path, node) for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)
    ]
    return sorted(((n.end_lineno - n.lineno + 1, f"{n.name} in {path.name}") for path, n in nodes), reverse=True)


def n_raises(paths: list[Path]) -> int:
    return sum(
        isinstance(n, ast.Raise) and n.exc is not None for p in paths for n in ast.walk(ast.parse(p.read_text()))
    )


def top_imports(path: Path) -> set[str]:
    """The project's modules that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in FOLDERS and name not in ("lit_model", "finetune")}


def run(root: Path, *args: str) -> str:
    return subprocess.run(
        [sys.executable, *args], cwd=root, env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip


def own_files(root: Path) -> int:
    """Files of the project that `python finetune/lora.py` imports before its main."""
    code = "import sys; from finetune import lora; print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    paths = [Path(name) for name in run(root, "-c", code).split() if name.startswith(f"{root}/")]
    return sum(path.stat().st_size > 0 for path in paths)  # an empty __init__.py is nothing to read


def options(root: Path) -> list[str]:
    names = re.findall(r"^  (--[\w.]+)", run(root, "finetune/lora.py", "--help"), re.MULTILINE)
    groups = {name.split(".")[0] for name in names if "." in name}
    return [name for name in names if name not in {*groups, "--config", "--help", "--print_config"}]


def table(root: Path) -> dict[str, object]:
    library = files(root, "lit_model", "finetune", "generate")
    shipped = library + files(root, "scripts")
    numbers: dict[str, object] = {}
    for folder in FOLDERS:
        paths = files(root, folder)
        numbers[f"{folder}: lines, code lines"] = f"{n_lines(paths):,}, {n_code_lines(paths):,}"
    numbers["lit_model + finetune + generate: lines"] = n_lines(library)
    numbers["core list: lines"] = n_lines([root / name for name in CORE if (root / name).exists()])
    numbers["longest functions"] = "; ".join(f"{n} {name}" for n, name in functions(shipped)[:4])
    numbers["raise per 1,000 code lines"] = round(1000 * n_raises(shipped) / n_code_lines(shipped), 1)
    numbers["tokens a code line"] = round(sum(len(code_tokens(p)) for p in shipped) / n_code_lines(shipped), 1)
    numbers["own files behind finetune/lora.py"] = own_files(root)
    numbers["options of finetune/lora.py"] = len(options(root))
    numbers["README: lines, words"] = f"{len((root / 'README.md').read_text().splitlines())}, " + str(
        len((root / "README.md").read_text().split())
    )
    return numbers


if __name__ == "__main__":
    roots = [Path(arg).resolve() for arg in sys.argv[1:]] + [ROOT]
    columns = [table(root) for root in roots]
    for name in columns[-1]:
        print(f"| {name} | " + " -> ".join(str(column[name]) for column in columns) + " |")
