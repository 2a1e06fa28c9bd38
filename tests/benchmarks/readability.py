"""Counts what makes code tiring to read: python tests/benchmarks/readability.py [--peer DIR ...]

Prints one column for this project and one for each other checkout. Tests are left out. A decision
is an if, a loop, an except, a conditional expression, a part of a comprehension, or one more
operand of `and` and `or`."""

import argparse
import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH = 100
LONGEST_FUNCTION = 40
MOST_DECISIONS = 12
MOST_PARAMETERS = 6
SKIPPED = {"tests", "test", "build", "node_modules"}
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(checkout: Path) -> Iterator[Path]:
    """Yields the Python files of a checkout that are neither tests nor hidden."""
    for path in sorted(checkout.rglob("*.py")):
        folders = path.relative_to(checkout).parts[:-1]
        is_hidden = any(part.startswith(".") or part in SKIPPED for part in folders)
        if not is_hidden and not path.name.startswith("test_"):
            yield path


def decisions(tree: ast.AST) -> int:
    """Counts the decisions below a node."""
    nodes = list(ast.walk(tree))
    branches = sum(isinstance(node, BRANCHES) for node in nodes)
    return branches + sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the parameters of a function, without self."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def count(source: str) -> Counter[str]:
    """Counts one file."""
    found: Counter[str] = Counter()
    lines = source.splitlines()
    filled = [line for line in lines if line.strip()]
    found["files"] = 1
    found["lines"] = len(lines)
    found["code"] = sum(not line.strip().startswith("#") for line in filled)
    found["wide"] = sum(len(line) > WIDTH for line in lines)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found["comments"] = sum(token.type == tokenize.COMMENT for token in tokens)
    tree = ast.parse(source)
    found["decisions"] = decisions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            found["ternaries"] += 1
            found["nested"] += sum(isinstance(inner, ast.IfExp) for inner in ast.walk(node)) > 1
        found["comprehensions"] += isinstance(node, COMPREHENSIONS)
        if isinstance(node, FUNCTIONS):
            count_function(node, found)
    return found


def count_function(function: ast.FunctionDef | ast.AsyncFunctionDef, found: Counter[str]) -> None:
    """Adds one function to the counts."""
    length = (function.end_lineno or 0) - function.lineno + 1
    found["functions"] += 1
    found["long"] += length > LONGEST_FUNCTION
    found["branched"] += decisions(function) > MOST_DECISIONS
    found["many"] += num_parameters(function) > MOST_PARAMETERS
    if not function.name.startswith("_"):
        found["public"] += 1
        found["documented"] += ast.get_docstring(function) is not None


def figures(checkout: Path) -> dict[str, str]:
    """Returns the figures of a checkout by their name."""
    total: Counter[str] = Counter()
    longest = 0
    for path in sources(checkout):
        found = count(path.read_text(encoding="utf-8", errors="replace"))
        longest = max(longest, found["lines"])
        total += found
    readme = checkout / "README.md"
    words = len(readme.read_text(errors="replace").split()) if readme.exists() else 0
    code = max(1, total["code"])
    return {
        "files / lines": f"{total['files']} / {total['lines']:,}",
        "longest file": f"{longest}",
        f"lines wider than {WIDTH}": f"{total['wide']} ({100 * total['wide'] / code:.0f} %)",
        "decisions per 100 lines of code": f"{100 * total['decisions'] / code:.1f}",
        "conditional expressions (nested) per 1000": (
            f"{1000 * total['ternaries'] / code:.0f} ({total['nested']})"
        ),
        "comprehensions per 1000": f"{1000 * total['comprehensions'] / code:.0f}",
        "comments per 100": f"{100 * total['comments'] / code:.1f}",
        f"functions / over {LONGEST_FUNCTION} lines": f"{total['functions']} / {total['long']}",
        f"functions over {MOST_DECISIONS} decisions": f"{total['branched']}",
        f"functions over {MOST_PARAMETERS} parameters": f"{total['many']}",
        "public functions with a docstring": (
            f"{100 * total['documented'] / max(1, total['public']):.0f} %"
        ),
        "words of README.md": f"{words:,}",
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Counts what makes code tiring to read.")
    parser.add_argument("--peer", action="append", default=[], type=Path, help="another checkout")
    checkouts = [ROOT, *parser.parse_args().peer]
    columns = [figures(checkout) for checkout in checkouts]
    print(" " * 42 + "".join(f"{checkout.name:>20}" for checkout in checkouts))
    for name in columns[0]:
        print(f"{name:42}" + "".join(f"{column[name]:>20}" for column in columns))


if __name__ == "__main__":
    main()
