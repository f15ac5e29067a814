"""The rules of the house that a machine can hold: floors, sizes, work at import, who may know what.
See CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hfscale import run_files
from hfscale.monitor.tags import TAGS

ROOT = Path(__file__).resolve().parents[1]
# a module imports from lower floors, and from its own package; errors.py is under everything
FLOORS = [
    {"errors", "registry", "log", "records", "packages", "deadline", "run_files"},
    {"hub", "metrics", "control_tokens"},
    {"config", "shards", "tokenizer", "encoding", "dist", "monitor"},
    {"corpus", "stream", "models", "engine"},
    {"objectives", "checkpoint"},
    {"tasks"},
    {"training"},
    {"run"},
    {"planning"},
    {"jobs", "reports", "checks", "tuning"},
    {"rehearsal"},
    {"worker"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SLOW = {
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "webdataset",
    "tokenizers",
    "accelerate",
    "tensorboard",
    "pyarrow",
    "pandas",
}
WORLD = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_\w+)$"
)
OPTIONAL = {
    "matplotlib",
    "lm-eval",
    "wandb",
    "mlflow-skinny",
}  # imported on use, with an error that says what to install
# import name -> what pip calls it, where they differ
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "mlflow": "mlflow-skinny",
}

MODULES = sorted([*(ROOT / "hfscale").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
TREES = {path: ast.parse(path.read_text()) for path in MODULES}


# held to the same sizes
SCRIPTS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of all imports of a file, those inside functions too."""
    for node in ast.walk(tree or TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute"
            # `from hfscale import errors` names a module too
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room(path: Path) -> str:
    """Return the package (or single module) of hfscale that a file belongs to."""
    return path.relative_to(ROOT / "hfscale").parts[0].removesuffix(".py")


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run at import, those under a top-level ``if`` or ``try`` too."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        ):
            continue
        yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                waiting += getattr(node, field, [])


def test_imports_go_strictly_downward():
    wrong = []
    for path in MODULES:
        if not path.is_relative_to(ROOT / "hfscale") or path.name == "__init__.py":
            continue
        own = room(path)
        assert own in FLOOR, (
            f"{relative(path)} is on no floor: add it to FLOORS, or put it into a room that is "
            "there"
        )
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "launch":
                wrong.append(f"{relative(path)}:{line} imports {name}: launch is on top of hfscale")
            if parts[0] != "hfscale" or parts[1] in (own, "errors"):
                continue
            if FLOOR[parts[1]] >= FLOOR[own]:
                wrong.append(
                    f"{relative(path)}:{line} imports {name}: from floor {FLOOR[own]} to floor "
                    f"{FLOOR[parts[1]]}"
                )
    assert not wrong, "\n".join(wrong)


def test_init_files_are_empty():
    assert [relative(p) for p in MODULES if p.name == "__init__.py" and p.read_text().strip()] == []


MOST_LINES, MOST_OF_A_FUNCTION, MOST_COLUMNS = 400, 60, 100
MOST_TOKENS_A_LINE, MOST_IN_A_STATEMENT = 9.0, 2
DENSE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def test_sizes():
    """A module a reader can hold, a function on a screen, a line that no window cuts."""
    wrong = []
    for path in [*MODULES, *SCRIPTS]:
        text = path.read_text()
        lines = text.splitlines()
        if len(lines) > MOST_LINES:
            wrong.append(f"{relative(path)} has {len(lines)} lines ({MOST_LINES})")
        wrong += [
            f"{relative(path)}:{number} has {len(line)} columns ({MOST_COLUMNS})"
            for number, line in enumerate(lines, start=1)
            if len(line) > MOST_COLUMNS
        ]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_OF_A_FUNCTION:
                    wrong.append(
                        f"{relative(path)}:{node.lineno} {node.name} has {length} lines "
                        f"({MOST_OF_A_FUNCTION})"
                    )
    assert not wrong, "\n".join(wrong)


def own_parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the nodes of a statement, without those of the statements inside of it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if not isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield node
                waiting.append(node)


def test_one_thought_a_statement():
    """At most two comprehensions or conditional expressions."""
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            count = sum(isinstance(part, DENSE) for part in own_parts(node))
            if count > MOST_IN_A_STATEMENT:
                wrong.append(f"{relative(path)}:{node.lineno} has {count}")
    assert not wrong, "\n".join(wrong)


def test_lines_breathe():
    """Tokens a line of code, without docstrings, comments and blank lines, over all modules."""
    tokens, lines = 0, 0
    for path, tree in TREES.items():
        documented = set[int]()
        for node in ast.walk(tree):
            described = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if described and ast.get_docstring(node) is not None:
                text = node.body[0]
                documented.update(range(text.lineno, (text.end_lineno or 0) + 1))
        with path.open() as file:
            code = [
                token
                for token in tokenize.generate_tokens(file.readline)
                if token.type not in LAYOUT and token.start[0] not in documented
            ]
        tokens += len(code)
        lines += len({line for token in code for line in range(token.start[0], token.end[0] + 1)})
    assert tokens / lines <= MOST_TOKENS_A_LINE, f"{tokens / lines:.2f} tokens a line of code"


def test_every_module_says_what_it_is_for():
    assert [
        relative(p) for p in MODULES if p.name != "__init__.py" and not ast.get_docstring(TREES[p])
    ] == []


def test_no_work_at_import():
    """Nothing but definitions: no bare call, loop or with-block at the top of a module of
    hfscale.
    """
    wrong = []
    for path in MODULES:
        if not path.is_relative_to(ROOT / "hfscale"):
            continue
        for node in top_level(TREES[path]):
            call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            if call or isinstance(node, ast.For | ast.While | ast.With):
                wrong.append(f"{relative(path)}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not wrong, "\n".join(wrong)


def test_no_default_is_a_section_with_values_of_its_own():
    """``optim: Optim = Optim(lr=5e-5)`` is lost as soon as one key of it is said: a subclass has
    the defaults.
    """
    classes = [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    sections, size = {"Section"}, 0
    while len(sections) > size:
        size = len(sections)
        sections |= {n.name for n in classes if sections & {ast.unparse(b) for b in n.bases}}
    assert {"Optim", "FinetuneOptim", "Generation"} <= sections
    wrong = []
    for path, tree in TREES.items():
        bodies = [tree.body, *(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
        for node in (statement for body in bodies for statement in body):
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            calls = [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]
            made = {
                name for n in calls for name in sections if name in ast.unparse(n.func).split(".")
            }
            if made and not any(ast.unparse(node.value) == f"{name}()" for name in made):
                wrong.append(f"{relative(path)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_the_command_line_and_config_load_no_slow_library():
    names = [
        relative(p).removesuffix(".py").replace("/", ".")
        for p in MODULES
        if p.name != "__init__.py"
    ]
    light = [
        n
        for n in names
        if n.startswith("launch.")
        or n.split(".")[1] in {"errors", "registry", "log", "records", "config"}
    ]
    script = (
        f"import sys, importlib\nfor n in {light}: "
        f"importlib.import_module(n)\nprint(*sorted({SLOW} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), f"loaded: {done.stdout}{done.stderr}"


def test_only_the_engine_imports_deepspeed_and_in_one_place():
    """By ``library.py``, without what makes each start slow."""
    by_name = {
        relative(p) for p in MODULES for _, name in imports(p) if name.split(".")[0] == "deepspeed"
    }
    of_library = {
        relative(p)
        for p in MODULES
        for _, name in imports(p)
        if name.startswith("hfscale.engine.library")
    }
    assert by_name == set()
    assert of_library and {Path(file).parts[:2] for file in of_library} == {("hfscale", "engine")}


@pytest.mark.slow
def test_a_start_loads_no_compiler_and_no_tracker():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, hfscale.engine.engine; "
            "print({'mlflow', 'torch._inductor.compile_fx'} & set(sys.modules))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("set()"), done.stdout


def test_a_manifest_knows_no_network():
    """``shards/open.py`` alone chooses between a folder and a URL; only it knows ``Remote``."""
    remote = "hfscale.shards.remote"
    knowing = {relative(p) for p in MODULES for _, name in imports(p) if name.startswith(remote)}
    assert knowing == {"hfscale/shards/open.py"}


def test_names_of_adapters_are_spelled_in_one_file():
    names = ("lora_", "base_layer", "base_model.model", "adapter_model", "adapter_config")
    spelling = {
        relative(p)
        for p in MODULES
        for node in ast.walk(TREES[p])
        if isinstance(node, ast.Constant) and any(name in str(node.value) for name in names)
    }
    assert spelling == {"hfscale/models/adapters.py"}


def test_a_model_is_called_in_one_place():
    """Objectives, tasks and probes ask a model by ``models/call.py``, so that all of them ask
    alike.
    """
    rooms = {"objectives", "tasks", "checkpoint", "training"}
    wrong = []
    for path in MODULES:
        if not path.is_relative_to(ROOT / "hfscale") or room(path) not in rooms:
            continue
        for node in ast.walk(TREES[path]):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if called and node.func.id in ("model", "engine"):
                wrong.append(f"{relative(path)}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not wrong, "\n".join(wrong)


def test_any_stands_only_where_nobody_knows_better():
    """Outside what faces DeepSpeed. Where a type is open, one alias gives it a name (``Example``,
    ``Output``, ``Logged``), so that a reader finds what it is.
    """
    lines = {
        f"{relative(path)}:{node.lineno}"
        for path, tree in TREES.items()
        if "hfscale/engine/" not in relative(path)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "Any"
    }
    assert len(lines) < 30, sorted(lines)


def test_the_world_is_read_in_one_file():
    """RANK, SLURM_PROCID and the like are read from the environment in dist/world.py alone."""
    wrong = []
    for path in MODULES:
        if relative(path) == "hfscale/dist/world.py":
            continue
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                source, key = ast.unparse(node.value), node.slice
            elif (
                isinstance(node, ast.Call)
                and node.args
                and ast.unparse(node.func).split(".")[-1] in ("get", "getenv", "pop")
            ):
                source, key = ast.unparse(node.func), node.args[0]
            else:
                continue
            if "env" in source and isinstance(key, ast.Constant) and WORLD.match(str(key.value)):
                wrong.append(f"{relative(path)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_nobody_reads_a_bare_world_size():
    """Who asks for a size says of which place (``World.data``, ``World.all``). The word stays in
    files, in messages and where torch wants it.
    """
    allowed = {
        "hfscale/dist/group.py": "torch's own",
        "hfscale/dist/rendezvous.py": "torch's own",
        "hfscale/config/rules.py": "a message",
        "hfscale/reports/show.py": "a message",
        "hfscale/checkpoint/state.py": "state.json",
        "hfscale/checkpoint/manager.py": "state.json",
        "hfscale/run/live.py": "state.json",
        "hfscale/reports/checkpoints.py": "state.json",
    }
    reading = {relative(p) for p in MODULES if "world_size" in p.read_text()}
    assert reading == set(allowed)
    names = [
        f"{relative(p)}:{n.lineno}"
        for p in MODULES
        if allowed.get(relative(p)) != "state.json"
        for n in ast.walk(TREES[p])
        if "world_size" in (getattr(n, "arg", ""), getattr(n, "attr", ""))
        and not isinstance(n, ast.keyword)
    ]
    assert names == []


def test_nothing_pickled_is_opened_outside_the_engine():
    """``torch.load`` and ``pickle.load`` run whatever a file says: checkpoints, exports and tars
    are never read by them.
    """
    wrong = [
        f"{relative(p)}:{n.lineno}"
        for p in MODULES
        for n in ast.walk(TREES[p])
        if isinstance(n, ast.Call)
        and ast.unparse(n.func) in ("torch.load", "pickle.load", "pickle.loads", "joblib.load")
    ]
    assert not wrong, "\n".join(wrong)


def test_ranks_say_json_to_each_other():
    """Collectives of objects open pickles of whoever came in as a rank."""
    pickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = [
        f"{relative(p)}:{line} imports {name}"
        for p in MODULES
        for line, name in imports(p)
        if name.split(".")[0] in pickling or name.startswith("torch.distributed.rpc")
    ]
    wrong += [
        f"{relative(p)}:{node.lineno} {ast.unparse(node)}"
        for p in MODULES
        for node in ast.walk(TREES[p])
        if isinstance(node, ast.Attribute)
        and re.search(r"(gather|scatter|broadcast|send|recv)_object(_list|s)?$", node.attr)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_of_json_are_read_by_their_shape():
    """``hfscale/records.py`` reads them: regular files, bounded, of types that are said once."""
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) == "json.load"
            or (ast.unparse(node.func) == "json.loads" and ".read" in ast.unparse(node.args[0]))
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_names_of_a_run_directory_are_said_once():
    """``hfscale/run_files.py`` has them. Those that are words too count where a path is put
    together; shards, corpora and caches have such files of their own.
    """
    names = {value for name, value in vars(run_files).items() if name.isupper()}
    files = {name for name in names if "." in name} - {run_files.REPORT}
    wrong = []
    for path in MODULES:
        joined = {
            node.right
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        }
        elsewhere = path.parent.name in ("shards", "corpus", "stream")
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            part_of_path = not elsewhere and (
                node in joined or re.fullmatch(r"\S*/\S*", node.value)
            )
            if any(tag.matches(node.value) for tag in TAGS):
                continue  # of a curve
            if set(node.value.split("/")) & (names if part_of_path else files):
                wrong.append(f"{relative(path)}:{node.lineno} {node.value!r}")
    assert [line for line in wrong if not line.startswith("hfscale/run_files.py")] == []


def test_no_error_is_swallowed():
    handlers = [
        (p, n) for p in MODULES for n in ast.walk(TREES[p]) if isinstance(n, ast.ExceptHandler)
    ]
    wrong = [
        f"{relative(p)}:{n.lineno}"
        for p, n in handlers
        if n.type is None or [type(line) for line in n.body] == [ast.Pass]
    ]
    assert not wrong, "\n".join(wrong)


def requirements() -> tuple[set[str], set[str]]:
    """Return the names that setup.cfg asks for: always, and as extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = "\n".join(setup["options.extras_require"].values())
    always, more = (
        {
            re.split(r"[<>=!~;\[]", line)[0].strip().lower()
            for line in text.split("\n")
            if line.strip()
        }
        for text in (setup["options"]["install_requires"], extras)
    )
    return always, more


def test_every_import_is_declared():
    always, extras = requirements()
    ours = {"hfscale", "launch", "tests", "benchmarks", "examples", *sys.stdlib_module_names}
    # benchmarks/stream.py makes an environment of their own for them
    ours |= {
        "streaming",
        "litdata",
    }
    wrong = []
    for root, allowed in {
        "hfscale": always | OPTIONAL,
        "launch": always,
        "tests": always | extras,
        "benchmarks": always | extras,
        "examples": always,
    }.items():
        for path in sorted((ROOT / root).rglob("*.py")):
            # scripts that are run by their path
            beside = {p.stem for p in path.parent.glob("*.py")}
            for line, name in imports(path, ast.parse(path.read_text())):
                top = name.split(".")[0]
                if (
                    top not in ours | beside
                    and DISTRIBUTIONS.get(top, top).replace("_", "-").lower() not in allowed
                ):
                    wrong.append(
                        f"{relative(path)}:{line} imports {top}, which setup.cfg does not ask for"
                    )
    assert not wrong, "\n".join(wrong)


def test_every_requirement_is_pinned():
    always, extras = requirements()
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert (always | extras) - pinned <= {"flash-attn"}  # builds against the user's own CUDA


def test_the_lowest_versions_are_those_of_setup_cfg():
    """tests/lowest.sh runs with the lower end of every range."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = map(Requirement, filter(None, setup["options"]["install_requires"].split("\n")))
    asked = {one.name: one.specifier for one in wanted if one.name != "torch"}
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if "==" in line)
    assert lowest.keys() == asked.keys()
    for name, specifier in asked.items():
        [bound] = [one.version for one in specifier if one.operator == ">="]
        assert specifier.contains(lowest[name]), f"{name} {lowest[name]} is out of {specifier}"
        assert Version(lowest[name]) == Version(bound), f"{name}: {lowest[name]} is not {bound}"


def tracked_text() -> list[Path]:
    """Return the files that people write, found without git (an export of the tree is tested
    too).
    """
    folders = [
        "hfscale",
        "launch",
        "configs",
        "slurm",
        "tests",
        "benchmarks",
        "examples",
        "docs",
        ".ci",
    ]
    files = [
        p
        for folder in folders
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    files += [
        p for p in ROOT.iterdir() if p.is_file() and p.suffix in (".md", ".cfg", ".toml", ".txt")
    ]
    return [p for p in files if p.suffix not in (".png", ".pyc")]


def test_no_paths_or_hosts_of_one_machine():
    private = re.compile(
        r"(?<![\w.])/(work|farm|opt|root|home)/\w|/tmp/\w+/|"
        r"py[p]i\.org|python[h]osted|download\.py[t]orch"
    )
    wrong = [
        f"{relative(p)}:{number}: {line.strip()[:100]}"
        for p in tracked_text()
        for number, line in enumerate(p.read_text(errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_test_folders_are_named_after_packages():
    packages = {
        p.name for root in ("hfscale", "launch") for p in (ROOT / root).rglob("*") if p.is_dir()
    }
    folders = {p.parent.name for p in (ROOT / "tests").rglob("test_*.py")}
    assert folders - packages <= {
        "tests",
        "hfscale",
        "launch",
        "helpers",
        "end_to_end",
        "benchmarks",
    }
