"""Modules import only from those above them, as the README lists them; nothing heavy loads at import."""

import ast
import re
import subprocess
import sys

from conftest import ROOT


def modules_in_readme():
    return re.findall(r"^  ([a-z_]+)\.py ", (ROOT / "README.md").read_text(), re.M)


def imports_of(module):
    tree = ast.parse((ROOT / "bertray" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bertray":
            if node.module == "bertray":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            else:
                yield node.module.split(".")[1]


def test_readme_lists_every_module_once():
    listed = modules_in_readme()
    present = {path.stem for path in (ROOT / "bertray").glob("*.py")} - {"__init__"}
    assert len(listed) == len(set(listed))
    assert set(listed) == present


def test_modules_import_from_above_only():
    listed = modules_in_readme()
    for place, module in enumerate(listed):
        below = set(imports_of(module)) - set(listed[:place])
        assert not below, f"{module} imports {below}, which README lists below it"


def test_ray_appears_only_where_it_has_to():
    importing = set()
    for module in modules_in_readme():
        for node in ast.walk(ast.parse((ROOT / "bertray" / f"{module}.py").read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "ray" for name in names):
                importing.add(module)
    assert importing == {"solo", "cluster", "meters", "worker", "embed", "fit", "serve", "sinks"}


def test_the_encoder_and_the_command_load_little():
    code = (
        "import sys, bertray, bertray.cli; bertray.cli._parser();"
        "assert not {'torch', 'ray', 'transformers', 'numpy', 'pydantic'} & set(sys.modules);"
        "import bertray.encoder; assert 'ray' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
