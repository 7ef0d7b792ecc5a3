"""grapefx-inspect: everything that its help promises, and every kind of bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from grapefx.report.cli import main

MLP = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)
    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())
"""
READY = MLP + "\nmodel = Net()\nexample_inputs = torch.zeros(8, 12)\n"


@pytest.fixture
def write(tmp_path):
    """Write a model file; returns its path."""

    def put(text, name="user_model.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return put


@pytest.fixture
def run(capsys):
    """Run the command: (exit code, stdout, stderr)."""

    def go(*arguments):
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return go


# what works


def test_a_file_as_text(run, write):
    code, out, _ = run(write(READY))
    assert code == 0
    for piece in ("user_model, batch 8", "bp", "dfa", "grape", "proved on the graph"):
        assert piece in out


def test_json_alone_goes_to_stdout(run, write):
    path = write("print('hello from the file')\n" + READY)
    code, out, err = run(path, "--format", "json", "--method", "dfa", "--workers", "1,inf")
    data = json.loads(out)
    assert code == 0 and "hello from the file" in err
    assert [m["method"] for m in data["methods"]] == ["bp", "dfa"]
    assert data["workers"] == [1, None] and data["methods"][1]["seconds"].keys() == {"1", "inf"}
    assert data["methods"][1]["plan"]["proved"] == 4


def test_all_options(run, write):
    code, out, _ = run(
        write(READY),
        *("--method", "grape", "--granularity", "layer", "--workers", "1,2", "--calib-every", "2"),
        *("--steps-per-epoch", "10", "--tangent-fraction", "0.25", "--align-every", "4"),
        *("--batch", "32", "--device-model", "h100"),
    )
    assert code == 0
    assert "batch 32" in out and "h100" in out and "every 2 epochs of 10 steps adds" in out
    assert "25 % align" in out and "one step in 4" in out


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("model = Net()", ["--input-shape", "8x12"]),
        ("", ["--model", "Net", "--input-shape", "8x12"]),
        ("", ["--input-shape", "8x12", "--dtype", "float64"]),
        ("def make():\n    return Net().double()\ndef example_inputs():\n    return (torch.zeros"
         "(8, 12, dtype=torch.float64),)", ["--model", "make"]),
        ("a = b = Net()\nexample_inputs = {'x': torch.zeros(8, 12)}", []),
        ("class Other(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
         "example_inputs = [torch.zeros(8, 12)]", []),
    ],
    ids=["instance", "class", "the only class", "function", "two names", "one without arguments"],
)  # fmt: skip
def test_finds_the_model(run, write, extra, arguments):
    text = MLP + extra + "\n"
    if "float64" in arguments:
        text = text.replace("self.first(x)", "self.first(x.to(torch.float32))")
    code, _, err = run(write(text), "--method", "dfa", *arguments)
    assert code == 0, err


def test_module_and_factory(run, write, tmp_path, monkeypatch):
    write(READY + "def build():\n    return Net()\n", "some_package_module.py")
    monkeypatch.chdir(tmp_path)
    code, out, err = run("some_package_module:build", "--method", "dfa")
    assert code == 0, err
    assert out.startswith("some_package_module:build")


def test_file_and_name(run, write):
    assert run(write(READY) + ":Net", "--method", "dfa")[0] == 0


def test_torchvision_allocates_nothing(run):
    import torch

    from grapefx.report.load import load

    loaded = load("torchvision:vgg19")  # 144 million parameters
    assert all(p.is_meta for p in loaded.model.parameters()) and not loaded.note
    assert loaded.example.shape == (32, 3, 224, 224) and loaded.example.dtype == torch.float32


def test_a_file_that_needs_numbers_is_run_for_real(run, write):
    text = READY + "scale = float(torch.ones(3).sum())\n"
    code, out, err = run(write(text), "--method", "dfa")
    assert code == 0, err
    assert "weights" in out and "allocated" in out


def test_a_plain_tensor_attribute_is_no_obstacle(run, write):
    scale = "self.scale = torch.full((12,), 2.0)"
    text = READY.replace("self.first = ", f"{scale}\n        self.first = ")
    text = text.replace("self.first(x)", "self.first(x * self.scale)")
    code, _, err = run(write(text), "--method", "dfa")
    assert code == 0, err


@pytest.mark.parametrize("form", ["html", "dot", "svg", "png", "json", "txt"])
def test_output_files(run, write, tmp_path, form):
    to = tmp_path / f"report.{form}"
    code, out, err = run(write(READY), "--method", "grape", "-o", str(to))
    if form in ("svg", "png"):
        pytest.importorskip("graphviz")
        import shutil

        if shutil.which("dot") is None:
            assert code == 1 and to.with_suffix(".dot").exists() and "install" in err
            return
    assert code == 0 and out == "" and "wrote" in err
    start = {"html": b"<!doctype", "dot": b"digraph", "svg": b"<?xml", "png": b"\x89PNG"}
    assert to.read_bytes().startswith(start.get(form, b""))


def test_dot_program_missing(run, write, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    code, _, err = run(write(READY), "--method", "dfa", "-o", str(tmp_path / "g.svg"))
    assert code == 1 and "apt install graphviz" in err
    assert (tmp_path / "g.dot").read_text().startswith("digraph")
    code, out, _ = run(write(READY), "--method", "dfa", "--format", "html")
    assert code == 0 and out.startswith("<!doctype")


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for piece in ("RUNS it", "examples:", "torchvision:resnet50", "exit codes", "--calib-every"):
        assert piece in out


# bad input: what is printed, and the exit code

BAD_IMPORT = "import torch\n\ndef helper():\n    raise ValueError('no such data')\n\nhelper()\n"


def test_import_raises(run, write):
    path = write(BAD_IMPORT)
    code, out, err = run(path)
    assert code == 1 and out == ""
    lines = err.strip().splitlines()
    assert lines[0] == "Traceback (most recent call last):" and path in lines[1]
    assert "ValueError: no such data" in err and "grapefx/" not in err
    assert lines[-1] == f"grapefx-inspect: {path} raised ValueError (above)"


def test_import_syntax_error(run, write):
    code, _, err = run(write("def f(:\n"))
    assert code == 1 and "SyntaxError" in err and "def f(:" in err


def test_import_exits(run, write):
    code, _, err = run(write("import sys\nsys.exit(3)\n"))
    assert code == 1 and "exits on import (code 3)" in err and "__main__" in err


@pytest.mark.parametrize(
    ("text", "arguments", "pieces", "want"),
    [
        ("x = 1\n", [], ["no model in", "nothing that makes one", "remedy"], 1),
        ("from torch import nn\ndef build(n):\n    return nn.Linear(n, n)\n", [],
         ["no model in", "build(n) (a function"], 1),
        (MLP.replace("def __init__(self)", "def __init__(self, n)"), [], ["Net(n) (a class"], 1),
        (MLP + "one, two = Net(), Net()\n", [], ["several models: one, two", "--model one"], 1),
        (MLP + "class Other(Net):\n    pass\n", [], ["several model classes: Net, Other"], 1),
        (MLP, [], ["no example input", "--input-shape"], 1),
        (READY, ["--model", "Nett"], ["no 'Nett'", "did you mean 'Net'"], 2),
        (READY, ["--model", "example_inputs"], ["not a model"], 2),
        (READY + "def one():\n    return 1\n", ["--model", "one"], ["returns a int"], 1),
        (READY, ["--input-shape", "8xq"], ["not of the form"], 2),
        (READY, ["--input-shape", "8x12", "--dtype", "float31"], ["not a torch dtype"], 2),
        (READY, ["--format", "pdf"], ["invalid choice: 'pdf'"], 2),
        (READY, ["--method", "dfaa"], ["invalid choice: 'dfaa'"], 2),
        (READY, ["--workers", "0"], ["at least 1"], 2),
        (READY, ["--tangent-fraction", "2"], ["tangent_fraction"], 2),
        (READY, ["--device-model", "h1000"], ["no device model", "h100"], 2),
        (READY, ["--format", "png"], ["needs -o"], 2),
        (READY, ["-o", "/nowhere/at/all.html"], ["cannot write", "no folder"], 2),
        (READY, ["-o", "/"], ["cannot write", "folder"], 2),
        ("from torch import nn\nmodel = nn.ReLU()\n", ["--input-shape", "4x4"],
         ["no trainable parameter"], 1),
        ("from torch import nn\nmodel = nn.Linear(4, 4)\n", ["--input-shape", "4x4"],
         ["no feedback point"], 1),
    ],
)  # fmt: skip
def test_bad_input(run, write, text, arguments, pieces, want):
    code, out, err = run(write(text), *arguments)
    assert code == want and out == ""
    assert "Traceback" not in err
    for piece in pieces:
        assert piece.lower() in err.lower()


def test_no_such_file_module_or_zoo_model(run):
    for target, piece in (
        ("nothing_here.py", "no such file"),
        ("nothing_here:build", "no module named 'nothing_here'"),
        ("nothing_here", "neither a file"),
        ("torchvision:resnet51", "Did you mean"),
    ):
        code, _, err = run(target)
        assert code == 2 and piece in err, err


def test_wrong_input_shape_names_the_layer(run, write):
    code, _, err = run(write(READY), "--input-shape", "8x13")
    assert code == 1
    assert "layer 'first' (Linear) fails on (8, 13) float32" in err


def test_data_dependent_branch_names_the_line(run, write):
    branch = "if x.sum() > 0:\n            x = -x\n        "
    text = READY.replace("return self.last", f"{branch}return self.last")
    code, _, err = run(write(text))
    assert code == 1
    assert "if x.sum() > 0" in err and "torch.where" in err


def test_batch_of_a_fixed_graph(run, write):
    text = READY.replace("torch.zeros(8, 12)", "torch.zeros(1, 12)")
    code, out, err = run(write(text), "--method", "dfa")
    assert code == 0 and "this batch size only" in out
    code, out, err = run(write(text), "--method", "dfa", "--batch", "16")
    assert code == 0 and "batch 16" in out, err


def test_as_a_program(write):
    """Once as a process: the exit code, and a stdout with nothing but the JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "grapefx.report.cli", write(READY), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "user_model"
