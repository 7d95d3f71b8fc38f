"""Plants small faults in the code, one at a time, and counts those that the tests find.

    OMP_NUM_THREADS=1 nice -n 10 python tools/mutants.py --number 300 --seed 1 --output mutants.jsonl

A mutant is one changed expression or statement of SCOPE, but not in docstrings, messages of errors, or log lines.
Lines are drawn with equal chances. First, a traced run finds which lines each test executes; tests that launch
processes are left out. Then each mutant meets the tests that execute its line, those of the mirrored file first, until
one fails. A line of the output tells file, operator, before, after, line, result (found, survived, timeout), the test
that failed, and how many tests were chosen of those that execute the line.
"""

import argparse
import ast
import collections
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import datasets  # noqa: F401  every run is a fork: what is heavy is imported here, hf_speechllm is not
import peft  # noqa: F401
import pytest
import transformers.trainer  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[1]
SCOPE = ("model/chat.py", "data", "evaluation", "audio/downloads.py", "formats", "training/checkpointing")
TESTS = ("model", "data", "evaluation", "audio", "formats", "training", "inference", "recipes", "cli")
MOST_SECONDS = 60  # of tests that a mutant meets
SWAPS = """Lt LtE, LtE Lt, Gt GtE, GtE Gt, Eq NotEq, NotEq Eq, In NotIn, NotIn In, Is IsNot, IsNot Is, And Or, Or And,
 Add Sub, Sub Add, Mult FloorDiv, FloorDiv Div, Div Mult, Mod Mult, BitOr BitAnd, BitAnd BitOr"""
OTHER = {getattr(ast, old): getattr(ast, new) for old, new in map(str.split, SWAPS.split(","))}
OPPOSITES = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)  # their swap negates a condition
MESSAGES = re.compile(r"(\w*log(ger)?\.(debug|info|warning\w*|error)|warnings\.warn|print|\w+\.error)\(")


def text(node, **fields):
    """Gives the text of an expression with other fields."""
    return f"({ast.unparse(type(node)(**{**vars(node), **fields}))})"


def changes(node):
    """Gives the faults of a node: operator, node to replace, and text."""
    match node:
        case ast.Compare(ops=[operator]):
            yield "comparison swapped", node, text(node, ops=[OTHER[type(operator)]()])
        case ast.BinOp() | ast.BoolOp() if type(node.op) in OTHER:
            kind = "arithmetic" if isinstance(node, ast.BinOp) else "boolean"
            yield f"{kind} swapped", node, text(node, op=OTHER[type(node.op)]())
        case ast.Constant(value=bool()):
            yield "boolean swapped", node, str(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant + 1", node, f"({node.value + 1})"
        case ast.Call():
            for keyword in node.keywords:
                if keyword.arg not in (None, "metadata", "help"):
                    kept = [item for item in node.keywords if item is not keyword]
                    yield "keyword dropped", node, text(node, keywords=kept)
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            yield "return None", node, "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Delete() | ast.Raise():
            yield "statement deleted", node, "pass"
        case ast.Assign(targets=[target]):
            names = re.findall(r"\w+", ast.unparse(node.value))
            if isinstance(target, (ast.Attribute, ast.Subscript)) or getattr(target, "id", None) in names:
                yield "statement deleted", node, "pass"
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
            if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], OPPOSITES)):
                yield "condition negated", test, f"(not ({ast.unparse(test)}))"


def sites(node, lines=(0, 1 << 30)):  # any line of the file, where it is not in a function
    """Gives the faults in a node, each with the first and last line whose execution matters."""
    called = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Call)) else ""
    if isinstance(node, (ast.JoinedStr, ast.arguments)) or MESSAGES.match(called):
        return
    if isinstance(node, ast.stmt) and lines[0]:
        block = isinstance(getattr(node, "body", None), list)
        lines = (node.lineno, node.body[0].lineno - 1 if block else node.end_lineno)
    children = list(ast.iter_child_nodes(node))
    match node:
        case ast.FunctionDef():
            lines = (node.body[0].lineno, node.end_lineno)
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            texts = [item for item in defaults if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            yield from (("default replaced", item, "None", lines) for item in texts)
            children = [*defaults, *node.body]
        case ast.AnnAssign():
            children = [node.value] if node.value else []
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.Raise():
            children = []
    yield from ((*change, lines) for change in changes(node))
    for child in children:
        yield from sites(child, lines)


def draw(number, seed):
    """Draws mutants, each with its span in the bytes of its file and the lines whose execution matters."""
    by_line = collections.defaultdict(list)
    scope = [REPOSITORY / "hf_speechllm" / name for name in SCOPE]
    for path in sorted(path for part in scope for path in (part.rglob("*.py") if part.is_dir() else [part])):
        source, name = path.read_bytes(), str(path.relative_to(REPOSITORY))
        starts = [0, *(match.end() for match in re.finditer(b"\n", source))]
        for operator, node, text, lines in sites(ast.parse(source)):
            span = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            mutant = {"file": name, "operator": operator, "before": source[slice(*span)].decode(), "after": text}
            by_line[name, node.lineno].append(({**mutant, "line": node.lineno}, span, lines))
    generator = random.Random(seed)
    return [generator.choice(by_line[key]) for key in generator.sample(sorted(by_line), number)]


def run_pytest(tree, limit, arguments, *plugins):
    """Runs pytest in a fork on a copy of the repository; gives its exit status, -9 after `limit` seconds."""
    if (child := os.fork()) == 0:
        os.setsid()
        output = os.open(tree.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        common = ["-q", "-p", "no:cacheprovider", "--basetemp", str(tree.parent / "temporary")]
        os._exit(int(pytest.main([*common, *arguments], plugins)))
    end = time.time() + limit
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) and time.time() < end:
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)  # also processes that a test has left
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class LineTracer:
    """A plugin of pytest that writes CPU seconds and executed lines of each test that passes."""

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(f"{self.root}/hf_speechllm/"):
            return None
        self.seen[os.path.relpath(frame.f_code.co_filename, self.root)].add(frame.f_lineno)
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seen, self.root = collections.defaultdict(set), item.config.rootpath
        start, failed = time.process_time(), item.session.testsfailed
        sys.settrace(self.trace), threading.settrace(self.trace)
        result = yield
        sys.settrace(None), threading.settrace(None)
        if item.session.testsfailed == failed:
            lines = {name: sorted(lines) for name, lines in self.seen.items()}
            with open(self.root / "traced.jsonl", "a") as file:
                print(json.dumps([item.nodeid, time.process_time() - start, lines]), file=file)
        return result


def choose_tests(file, lines, tests):
    """Chooses tests that execute lines, those of the mirrored file first; gives also how many there are."""
    mirror = re.sub(r"^hf_speechllm(.*)/(\w+\.py)$", r"tests\1/test_\2::", file)
    covering = [test for test in tests if any(lines[0] <= line <= lines[1] for line in test[2].get(file, ()))]
    covering.sort(key=lambda test: (not test[0].startswith(mirror), test[1]))
    total = 0.0
    return [test for test in covering if (total := total + test[1]) <= MOST_SECONDS] or covering[:1], len(covering)


def main():
    """Draws mutants, runs them, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    mutants, tree = draw(options.number, options.seed), Path(tempfile.mkdtemp()) / "tree"
    shutil.copytree(REPOSITORY, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
    tree.with_name("shared").symlink_to((REPOSITORY.parent / "shared").resolve())
    run_pytest(tree, 7200, ["-k", "not two and not ranks", *(f"tests/{name}" for name in TESTS)], LineTracer())
    tests = [json.loads(line) for line in (tree / "traced.jsonl").read_text().splitlines()]
    with options.output.open("w", encoding="utf-8") as output:
        for number, (mutant, (first, last), lines) in enumerate(mutants):
            chosen, covering = choose_tests(mutant["file"], lines, tests)
            limit, path = 60 + 10 * sum(seconds for _, seconds, _ in chosen), tree / mutant["file"]
            source = path.read_bytes()
            path.write_bytes(source[:first] + mutant["after"].encode() + source[last:])
            os.utime(path, (number, number))  # no bytecode of another mutant is taken for this one's
            status = run_pytest(tree, limit, ["-x", *(name for name, *_ in chosen)]) if chosen else 0
            path.write_bytes(source)
            log = tree.with_name("log").read_text(errors="replace") if status else ""
            by = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.M)
            mutant["result"] = {-signal.SIGKILL: "timeout", 0: "survived"}.get(status, "found")
            mutant |= {"by": by and by[1], "tests": f"{len(chosen)} of {covering}"}
            print(json.dumps(mutant, ensure_ascii=False), file=output, flush=True)
    shutil.rmtree(tree.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
