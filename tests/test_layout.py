"""What may import what, what the packages export, and what the import needs and does."""

import ast
import importlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
ORDER = ("plugins", "kernels", "blocks")
LAST = ("examples", "perf", "tests")
BESIDE = (  # tools for each other
    ("perf", "tests", "support"),
    ("examples", "perf", "meters"),
    ("examples", "perf", "models"),  # the same model in plain PyTorch
)
PACKAGE = ("trilith", *ORDER)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PUBLIC = {
    "trilith": {
        "__version__",
        "blocks",
        "explain",
        "fuse",
        "inspect",
        "kernels",
        "op",
        "plugins",
        "trace",
        "unfuse",
        "register_flash_attention",
        "register_transformers",
        "use_implementation",
    },
    "trilith.plugins": {
        "BackwardContext",
        "CONTRACT",
        "Cost",
        "Failure",
        "Implementation",
        "Manager",
        "ModuleSpec",
        "Op",
        "OpCalled",
        "OpSpec",
        "PluginWarning",
        "Registry",
        "Sample",
        "ScoreMod",
        "SelectionKey",
        "TRITON_DEVICES",
        "hookimpl",
        "manager",
        "may_fuse",
        "registry",
        "trace",
        "use_implementation",
    },
    "trilith.inspect": {"GradientFlow", "Layer", "gradcheck", "gradient_flow", "jacobian"},
    "trilith.kernels": {
        "add_layer_norm",
        "add_rms_norm",
        "attention",
        "attention_qkvpacked",
        "batch_norm",
        "bias_act",
        "bias_act_linear",
        "bias_dropout_add",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "decode_attention",
        "dropout",
        "gated_act",
        "gated_act_linear",
        "launch",
        "layer_norm",
        "layer_norm_linear",
        "linear_cross_entropy",
        "log_softmax",
        "merge_attention",
        "mse_loss",
        "planned",
        "rms_norm",
        "rms_norm_linear",
        "rotary",
        "rotary_qkvpacked",
        "scaled_dot_product_attention",
        "softmax",
        "varlen_attention",
    },
    "trilith.blocks.drop_in": {
        "BCEWithLogitsLoss",
        "BatchNorm1d",
        "LogSoftmax",
        "MSELoss",
        "Softmax",
        "CrossEntropyLoss",
        "Dropout",
        "ELU",
        "GELU",
        "LayerNorm",
        "LeakyReLU",
        "MultiheadAttention",
        "RMSNorm",
        "ReLU",
        "SiLU",
        "Sigmoid",
        "Tanh",
        "TransformerDecoderLayer",
        "TransformerEncoderLayer",
    },
    "trilith.blocks.parallel": {
        "context_parallel",
        "context_parallel_attention",
        "load_checkpoint",
        "save_checkpoint",
        "pipeline_stage",
        "tensor_parallel_plan",
        "vocab_parallel_cross_entropy",
        "vocab_parallel_linear_cross_entropy",
    },
    "trilith.blocks": {
        "Alibi",
        "CrossAttention",
        "StochasticDepth",
        "GLU",
        "GatedActivation",
        "GatedMLP",
        "GeGLU",
        "KVCache",
        "LMConfig",
        "LayerNorm",
        "LearnedPosition",
        "MLP",
        "PagedKVCache",
        "RMSNorm",
        "ReGLU",
        "ReLU2",
        "Residual",
        "Rotary",
        "SelfAttention",
        "SinusoidalPosition",
        "SwiGLU",
        "TransformerBlock",
        "TransformerLM",
        "build_lm",
    },
}


def sources(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def imports(path):
    """Dotted names that a file imports, wherever in it; relative ones made absolute."""
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def area(name):
    """plugins, kernels, blocks, examples, perf, tests, trilith, or None for what is not ours."""
    first, _, rest = name.partition(".")
    if first == "trilith":
        second = rest.partition(".")[0]
        return second if second in ORDER else "trilith"
    return first if first in (*ORDER, *LAST) else None


def allowed(folder):
    if folder in ORDER:
        return set(ORDER[: ORDER.index(folder) + 1]) | {"trilith"}
    return {*ORDER, "trilith", folder, *(LAST if folder == "tests" else ())}


@pytest.mark.parametrize("folder", [*ORDER, *LAST])
def test_imports_go_one_way(folder):
    shared = {"trilith._version", "trilith"}
    wrong = []
    for path in sources(folder) if (ROOT / folder).exists() else []:
        for name in imports(path):
            target = area(name)
            upward = target is not None and target not in allowed(folder)
            facade = folder in ORDER and target == "trilith" and name not in shared
            if (folder, *name.split(".")[:2]) in BESIDE:
                continue
            if upward or facade:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", PACKAGE)
def test_packages_name_each_other_by_their_real_names(folder):
    """`import kernels` works from the root of a checkout alone, and shadows someone else's."""
    for path in sources(folder):
        bare = [name for name in imports(path) if name.partition(".")[0] in (*ORDER, *LAST)]
        assert not bare, f"{path.relative_to(ROOT)} imports {bare}"


def test_package_list_is_what_lies_on_disk():
    settings = PROJECT["tool"]["setuptools"]
    folders = {name: ROOT / path for name, path in settings["package-dir"].items()}
    on_disk = set()
    for name, folder in folders.items():
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            on_disk.add(".".join((name, *parts)))
    assert set(settings["packages"]) == on_disk
    assert all((ROOT / folder).exists() for folder in folders.values())


def test_every_folder_with_sources_is_a_package():
    folders = {path.parent for path in sources(*PACKAGE)}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    module = importlib.import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    assert len(module.__all__) == len(PUBLIC[name])
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing


def test_type_checkers_are_told_what_is_loaded_when_it_is_asked_for():
    import trilith

    tree = ast.parse(Path(trilith.__file__).read_text())
    told = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(told.test) == "TYPE_CHECKING"
    names = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in told.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == trilith._FUNCTIONS | {name: ("trilith", name) for name in trilith._MODULES}


@pytest.mark.parametrize("name", ["trilith.kernels", "trilith.blocks"])
def test_public_names_say_what_they_are(name):
    module = importlib.import_module(name)
    silent = [public for public in module.__all__ if not getattr(module, public).__doc__]
    assert not silent


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_source_distribution_has_the_documents_and_no_stray_tests(tmp_path):
    for folder in (*PACKAGE, "docs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__py*"))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt")]:
        shutil.copy(path, tmp_path)
    shutil.copy(ROOT / "MANIFEST.in", tmp_path)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (made,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "docs/attention.md"} <= names
    assert {"plugins/README.md", "blocks/README.md", "trilith/py.typed"} <= names
    assert not {name for name in names if name.startswith("tests/")}


@pytest.mark.parametrize("folder", ORDER)
def test_bare_import_is_refused(folder):
    run = python(f"import {folder}")
    assert run.returncode != 0
    assert f"ImportError: import trilith.{folder}, not {folder}" in run.stderr


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else find(name, path, target)

PathFinder.find_spec = find_spec
"""


def test_without_triton_the_library_runs_on_its_reference_path():
    run = python(
        WITHOUT_TRITON
        + """
import trilith, torch
from trilith import kernels as F
from trilith.blocks import LayerNorm

x = torch.randn(3, 8, requires_grad=True)
y = F.layer_norm(x, (8,))
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
(F.bias_act(y).sum() + F.cross_entropy(y, torch.tensor([0, 1, 2])) + F.rms_norm(y, (8,)).sum()
 + F.scaled_dot_product_attention(*[y.view(1, 1, 3, 8)] * 3).sum()).backward()
assert x.grad.isfinite().all()
assert "triton" not in sys.modules
assert trilith.plugins.TRITON_DEVICES == ()
print("done")
"""
    )
    assert run.stdout == "done\n", run.stderr


def test_importing_the_library_does_not_import_the_heavy_parts():
    run = python(
        "import sys, trilith\n"
        "assert not {'torch', 'triton', 'pluggy'} & set(sys.modules), sorted(sys.modules)\n"
        "print(trilith.__version__)"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == importlib.import_module("trilith").__version__


def test_kernels_and_blocks_run_without_importing_dynamo():
    """Which takes longer to import than everything here; whoever compiles imports it."""
    run = python(
        """
import sys, torch
from trilith import blocks, fuse, kernels
model = blocks.build_lm(blocks.LMConfig(vocab_size=16, dim=32, n_layers=1, n_heads=2))
tokens = torch.randint(16, (2, 5))
model(tokens, tokens).backward()
fuse(torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True))
kernels.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 16), torch.randn(4, 4) > 0)
print("torch._dynamo" in sys.modules)
"""
    )
    assert run.stdout == "False\n", run.stderr


# By the name that it has where it is defined, and all that is inside.
FORBIDDEN = {
    *("aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "ssl", "telnetlib"),
    *("urllib", "urllib3", "webbrowser", "xmlrpc", "huggingface_hub", "fsspec"),
    *("cloudpickle", "dill", "joblib", "marshal", "multiprocessing", "pickle", "shelve"),
    *("eval", "exec", "compile", "__import__", "builtins", "code", "runpy"),
    *("torch.load", "torch.hub", "torch.jit.load", "torch.package", "torch.multiprocessing"),
    *("torch.utils.model_zoo", "torch.serialization", "numpy.load"),
    "torch.distributed.checkpoint.FileSystemReader",  # its index is a pickle
    "torch.distributed.all_gather_object",
    "torch.distributed.broadcast_object_list",
    "torch.distributed.gather_object",
    "torch.distributed.recv_object_list",
    "torch.distributed.scatter_object_list",
}
IMPORTERS = (["import_module"], ["__import__"])
SHIPPED = [*sources(*PACKAGE), *sorted((ROOT / "plugins").rglob("*.py.template"))]


def dotted(node):
    """a.b.c as ["a", "b", "c"]; empty for what no name starts."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return [*inner, node.attr] if inner else []
    return [node.id] if isinstance(node, ast.Name) else []


def used(text):
    """Every name that a source imports, reads or calls, as it is called where it is defined."""
    tree = ast.parse(text)
    origin = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin |= {a.asname: a.name for a in node.names if a.asname}
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            origin |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            yield from (f"{node.module}.{a.name}" for a in node.names)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and (parts := dotted(node)):
            yield ".".join([origin.get(parts[0], parts[0]), *parts[1:]])
        elif isinstance(node, ast.Call) and node.args and dotted(node.func)[-1:] in IMPORTERS:
            named = node.args[0]
            yield named.value if isinstance(named, ast.Constant) else ""


def unsafe(text):
    found = {
        name
        for name in used(text)
        for banned in FORBIDDEN
        if name == banned or name.startswith(f"{banned}.")
    }
    return found | ({"weights_only=False"} if "weights_only=False" in text else set())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_unpickling_no_eval_no_network(path):
    assert not unsafe(path.read_text())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pickle", "pickle"),
        ("def f(path):\n    from pickle import load", "pickle.load"),
        ("import urllib.request as web\nweb.urlopen('x')", "urllib.request.urlopen"),
        ("from torch import load\nload('x')", "torch.load"),
        ("import torch as t\nread = t.load", "torch.load"),
        ("from torch import hub\nhub.load('x')", "torch.hub.load"),
        ("eval('1')", "eval"),
        ("table = {'run': exec}", "exec"),
        ("from importlib import import_module\nimport_module('marshal')", "marshal"),
        ("import torch.distributed as d\nd.gather_object(1)", "torch.distributed.gather_object"),
        ("state = read(path, weights_only=False)", "weights_only=False"),
    ],
)
def test_what_is_unsafe_is_seen(text, name):
    assert name in unsafe(text)


def test_what_only_sounds_unsafe_is_not():
    text = (
        "import torch\nmodel.eval()\ntorch.compile(f)\ndef load(x):\n    return x.load()\nload(1)"
    )
    assert not unsafe(text)


@pytest.mark.parametrize(
    ("folder", "name", "fine"),
    [
        ("plugins", "trilith.kernels", False),
        ("kernels", "trilith.blocks.mlp", False),
        ("kernels", "trilith.plugins", True),
        ("blocks", "trilith.kernels", True),
        ("blocks", "tests.support", False),
        ("perf", "trilith.blocks", True),
        ("perf", "examples.lm", False),
    ],
)
def test_rule_of_import_direction(folder, name, fine):
    assert (area(name) in allowed(folder)) == fine


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = ROOT / "kernels" / "attention" / "imaginary.py"
    text = "def f():\n    from ..norms import g\n    import trilith.blocks\n    from . import h\n"
    (tmp_path / "kernels" / "attention").mkdir(parents=True)
    real = tmp_path / path.relative_to(ROOT)
    real.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        found = set(imports(real))
    assert {"kernels.norms", "kernels.norms.g", "trilith.blocks", "kernels.attention.h"} <= found
