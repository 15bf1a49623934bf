"""launch/export.py: what is written answers as the network does, or is not written."""

import pickle
import sys

import pytest
import torch
from conftest import ROOT
from launching import command, python
from making import path_of
from safetensors.torch import load_file

import nndist
from nndist.cli.run_commands import export_command
from nndist.trained.export import compared
from nndist.trained.loaded_run import load_run

PICKLES = [(pickle, "load"), (pickle, "loads"), (torch, "load"), (torch, "save")]
PICKLES = [(module, name, getattr(module, name)) for module, name in PICKLES]  # before they are refused
QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1, "data_source": "sample"}
SMALL = {
    "mnist_simple_cnn": {"max_steps": 2},
    "mnist_rnn": {"hidden": 16, "max_steps": 2},
    "mnist_vit": {"width": 16, "depth": 1, "max_steps": 2},
    "char_bert": {"num_layers": 1, "width": 16, "length": 32, "max_steps": 2},
    "mnist_gan": {"width": 4, "max_steps": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gives the folder of a short run of a shipped recipe."""
    runs = tmp_path_factory.mktemp("runs")

    def of(name):
        place = runs / name / "it"
        if not place.exists():
            nndist.train(path_of(name), run="it", runs_dir=runs, **QUIET, **SMALL[name])
        return place

    return of


def exported(capsys, *arguments):
    capsys.readouterr()
    code = 0
    try:
        export_command([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


def test_safetensors_of_one_of_several_networks(folder, tmp_path, capsys):
    run, out = folder("mnist_gan"), tmp_path / "generator.safetensors"
    code, said, _ = exported(capsys, run, "--to", "safetensors", "--network", "generator", "--output", out)
    state = load_run(run).networks["generator"].state_dict()
    found = load_file(out)
    assert code == 0 and found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)
    assert said.count("largest difference 0.0e+00") == 2 and "float32 [batch, 64] -> [batch, 1, 28, 28]" in said


def test_a_file_whose_answers_differ_is_not_left(folder, tmp_path, capsys, monkeypatch):
    calls = iter(range(99))
    monkeypatch.setattr("nndist.trained.export.answers", lambda output: [output + next(calls)])
    out = tmp_path / "out.safetensors"
    code, _, errors = exported(capsys, folder("mnist_simple_cnn"), "--to", "safetensors", "--output", out)
    assert code == 1 and len(errors) == 1 and "not written" in errors[0] and "--tolerance" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_how_answers_compare():
    ones = torch.ones(2, 2)
    assert compared({2: [ones]}, {2: [ones + 1e-3]})[1] == pytest.approx(1e-3, rel=1e-3)
    assert compared({2: [ones]}, {2: [ones[:1]]})[1] == float("inf")
    assert compared({2: [ones]}, {2: [ones * float("nan")]})[1] == float("inf")
    assert compared({2: [ones, ones]}, {2: [ones, ones * float("nan")]})[1] == float("inf"), "the second of two outputs"
    assert compared({2: []}, {2: []})[1] == 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--to", "safetensors"], "--network: name one; mnist_gan/it has discriminator, generator"),
        (["--to", "safetensors", "--network", "judge"], "--network judge: no such network"),
        (["--to", "pickle"], "--to"),
        (["--to", "onnx", "--network", "generator"], "pip install onnx onnxscript onnxruntime"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    code, _, errors = exported(capsys, folder("mnist_gan"), *arguments, "--output", tmp_path / "out")
    assert code == 2 and len(errors) == 1 and expected in errors[0] and list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced_is_one_line(tmp_path, capsys):
    (tmp_path / "fixed.py").write_text(
        (ROOT / "recipes/sum_mlp.py").read_text().replace("x = self.fc3(x)", "x = self.fc3(x.reshape(len(x), 60))")
    )
    run = nndist.train(tmp_path / "fixed.py", run="it", runs_dir=tmp_path / "runs", **QUIET, max_steps=2).folder
    code, _, errors = exported(capsys, run, "--to", "torch-export", "--output", tmp_path / "out.pt2")
    assert code == 2 and len(errors) == 1 and "x.shape[0]" in errors[0] and not (tmp_path / "out.pt2").exists()


def test_a_table_is_exported_where_its_file_is_away(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("\n".join(f"{i / 9},{i % 4},{i}" for i in range(40)))
    text = (ROOT / "tests/toys.py").read_text() + (
        "\n\n@dataclass(kw_only=True)\nclass Table(Line):\n    def data(self, config):\n"
        f"        lines = open({str(tmp_path / 'table.csv')!r}).read().split()\n"
        "        rows = torch.tensor([[float(cell) for cell in line.split(',')] for line in lines])\n"
        "        x, y = rows[:, [0, 1, 0, 1]], rows[:, 2:] / 40\n"
        "        return Data(train=Resident(x, y), test=Resident(x, y))\n"
    )
    (tmp_path / "table.py").write_text(text)
    run = nndist.train(f"{tmp_path}/table.py:Table", run="it", runs_dir=tmp_path / "runs", **QUIET, max_steps=2).folder
    (tmp_path / "table.csv").unlink()
    code, said, errors = exported(capsys, run, "--to", "safetensors", "--output", tmp_path / "out.safetensors")
    assert code == 0, errors
    assert "note     the data are not available, so outputs for made-up numbers are compared" in said
    assert "table.csv" in said and said.count("parity") == 2 and "[batch, 4] -> [batch, 1]" in said


def test_any_network_is_exported_where_its_data_are_away(tmp_path, capsys):
    (tmp_path / "data.pt").write_bytes(b"")
    text = (ROOT / "tests/toys.py").read_text() + (
        "\n\nclass Both(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.words, self.head = nn.Embedding(12, 3), nn.Linear(3 + 3 * 64, 1)\n"
        "    def forward(self, image, code):\n"
        "        return self.head(torch.cat([image.flatten(1), self.words(code)], 1))\n"
        "\n\n@dataclass(kw_only=True)\nclass Pictures(Line):\n    def data(self, config):\n"
        f"        open({str(tmp_path / 'data.pt')!r})\n"
        "        parts = torch.rand(20, 3, 8, 8), torch.arange(20) % 7 + 5, torch.rand(20, 1)\n"
        "        return Data(train=Resident(*parts), test=Resident(*parts))\n"
        "    def networks(self):\n        return {'model': Both()}\n"
        "    def loss(self, networks, batch):\n"
        "        return (networks['model'](*batch[:2]) - batch[2]).square().squeeze(1)\n"
        "    def score(self, networks, batch):\n        return {'loss': self.loss(networks, batch)}\n"
    )
    (tmp_path / "both.py").write_text(text)
    run = nndist.train(
        f"{tmp_path}/both.py:Pictures", run="it", runs_dir=tmp_path / "runs", **QUIET, max_steps=2
    ).folder
    (tmp_path / "data.pt").unlink()
    code, said, errors = exported(capsys, run, "--to", "safetensors", "--output", tmp_path / "out")
    assert code == 0, errors
    assert "float32 [batch, 3, 8, 8], int64 [batch] -> [batch, 1]" in said and said.count("parity") == 2
    assert "note     the data are not available, so outputs for made-up numbers are compared" in said
    kept = (run / "run.json").read_text()
    for damage in ('"shape": [30000000', '"shape": [-3'):
        (run / "run.json").write_text(kept.replace('"shape": [\n     3', damage).replace('"shape": [3', damage))
        code, _, errors = exported(capsys, run, "--to", "safetensors", "--output", tmp_path / "out2")
        assert code == 2 and errors[0].startswith("error: run.json: inputs are damaged") and len(errors) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "name, to",
    [("mnist_simple_cnn", "onnx"), ("mnist_rnn", "onnx"), ("mnist_vit", "onnx"), ("char_bert", "torch-export")],
)
def test_other_programs_answer_alike_in_any_batch(folder, tmp_path, name, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / ("out.onnx" if to == "onnx" else "out.pt2")
    done = command(ROOT / "launch/export.py", folder(name), "--to", to, "--output", out)
    assert done.returncode == 0 and done.stdout.count("parity") == 2, done.stderr
    inputs = [None] * 2
    network = load_run(folder(name)).networks["model"]
    for place, size in enumerate((3, 11)):
        generator = torch.Generator().manual_seed(size)
        images = torch.rand(size, 1, 28, 28, generator=generator)
        inputs[place] = images if name.startswith("mnist") else torch.randint(50, (size, 32), generator=generator)
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        answers = [torch.from_numpy(session.run(None, {entry.name: given.numpy()})[0]) for given in inputs]
        for given, answer in zip(inputs, answers, strict=True):
            torch.testing.assert_close(answer, network(given), rtol=1e-3, atol=1e-5)
    else:  # torch reads its own file with pickle, so in a process of its own
        code = f"import torch; program = torch.export.load({str(out)!r}).module()\n"
        code += "for size in (3, 11): print(program(torch.zeros(size, 32, dtype=torch.int64)).shape[0])"
        assert python("-c", code).stdout.split() == ["3", "11"]


NETWORKS = """


class Head(nn.Linear):
    def __init__(self):
        super().__init__(4, 1)


class Named(Head):
    def forward(self, x):
        return {"sum": super().forward(x), "hidden": (x * 2, x.abs())}


@dataclass
class Parts:
    sum: torch.Tensor
    twice: torch.Tensor


class OfParts(Head):
    def forward(self, x):
        return Parts(super().forward(x), x * 2)


class OfTransformers(Head):
    def forward(self, x):
        from transformers.modeling_outputs import SequenceClassifierOutput
        return SequenceClassifierOutput(logits=super().forward(x), hidden_states=(x * 2,))


class Masked(Head):
    def forward(self, x, scale=2.0, mask=None, unused=None):
        return super().forward(x if mask is None else x.masked_fill(mask, 0.0) * scale)


class ByName(Head):
    def forward(self, x, *, mask):
        return super().forward(x.masked_fill(mask, 0.0))


class AnyNumber(Head):
    def forward(self, x, *others):
        return super().forward(x) + sum(other.sum(1, keepdim=True) for other in others)


def Compiled():
    return torch.compile(Head(), backend="eager")


class Counting(Head):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x) + self.calls


class Complex(Head):
    def forward(self, x):
        return torch.complex(super().forward(x), x[:, :1])


class Drawing(Head):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x[:, :1])


class Extra(Head):
    def get_extra_state(self):
        return {"version": 2}
    def set_extra_state(self, state):
        pass


@dataclass(kw_only=True)
class Any(Line):
    def networks(self):
        return {"model": NETWORK()}
    def initial_weights(self, networks):
        self.criterion = nn.MSELoss(reduction="none")
    def loss(self, networks, batch):
        x, y = batch
        found = networks["model"](CALL)
        if not isinstance(found, torch.Tensor):
            found = next(iter(vars(found).values() if KIND else found.values()))
        return (found - y).abs().square().squeeze(1)
"""


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Gives the folder of a run of one of NETWORKS; afterwards torch.export may use pickle, as it does."""

    def of(network, call="x"):
        text = (ROOT / "tests/toys.py").read_text() + NETWORKS.replace("NETWORK()", f"{network}()")
        (tmp_path / "any.py").write_text(
            text.replace("CALL", call).replace("KIND", str(network == "OfParts")).replace("class Any(", "class Some(")
        )
        run = nndist.train(f"{tmp_path}/any.py:Some", run="it", runs_dir=tmp_path / "runs", **QUIET, max_steps=2)
        for module, name, function in PICKLES:
            monkeypatch.setattr(module, name, function)
        return run.folder

    return of


@pytest.mark.parametrize("to", ["safetensors", "torch-export", pytest.param("onnx", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "network, shown",
    [
        ("Named", "-> sum [batch, 1], hidden.0 [batch, 4], hidden.1 [batch, 4]"),
        ("OfParts", "-> sum [batch, 1], twice [batch, 4]"),
        ("OfTransformers", "-> logits [batch, 1], hidden_states.0 [batch, 4]"),
    ],
)
def test_outputs_of_any_nesting_are_named(run_of, tmp_path, capsys, network, shown, to):
    if network == "OfTransformers":
        pytest.importorskip("transformers")
    code, said, errors = exported(capsys, run_of(network), "--to", to, "--output", tmp_path / "out")
    assert code == 0, errors
    assert shown in said and said.count("parity") == 2
    if to == "onnx":
        import onnx

        names = [one.name for one in onnx.load(tmp_path / "out").graph.output]
        assert names[0] in ("sum", "logits") and ("hidden_0" in names or network != "Named")


@pytest.mark.parametrize("to", ["torch-export", pytest.param("onnx", marks=pytest.mark.long)])
def test_what_is_given_by_name_is_exported_too(run_of, tmp_path, capsys, to):
    run = run_of("Masked", "x, mask=x > 0.5")
    code, said, errors = exported(capsys, run, "--to", to, "--output", tmp_path / "out")
    assert code == 0, errors
    assert "float32 [batch, 4], 2.0, bool [batch, 4] -> [batch, 1]" in said
    if to == "torch-export":
        x = torch.rand(7, 4)
        model = load_run(run).networks["model"]
        with torch.no_grad():
            found = torch.export.load(tmp_path / "out").module()(x, 2.0, x > 0.5)
            assert torch.allclose(found, model(x, mask=x > 0.5)) and not torch.allclose(found, model(x))


@pytest.mark.parametrize("network, call", [("AnyNumber", "x"), ("AnyNumber", "x, x, 2 * x"), ("Compiled", "x")])
def test_any_number_of_inputs_is_exported(run_of, tmp_path, capsys, network, call):
    code, said, errors = exported(capsys, run_of(network, call), "--to", "torch-export", "--output", tmp_path / "out")
    assert code == 0 and said.count("parity") == 2, errors


def test_what_is_taken_by_name_only_is_refused(run_of, tmp_path, capsys):
    run = run_of("ByName", "x, mask=x > 0.5")
    code, _, errors = exported(capsys, run, "--to", "torch-export", "--output", tmp_path / "out")
    assert code == 2 and len(errors) == 1 and "'model' is called with mask by keyword only" in errors[0]


@pytest.mark.parametrize("to", ["safetensors", "torch-export"])
def test_the_state_is_that_before_the_first_call(run_of, tmp_path, capsys, to):
    run = run_of("Counting")
    code, said, errors = exported(capsys, run, "--to", to, "--output", tmp_path / "out")
    assert code == 0, errors
    calls = load_run(run).networks["model"].calls
    found = load_file(tmp_path / "out") if to == "safetensors" else torch.export.load(tmp_path / "out").state_dict
    assert found["calls"] == calls and said.count("largest difference 0.0e+00") == 2


def test_complex_outputs_are_compared_in_both_parts(run_of, tmp_path, capsys):
    code, said, errors = exported(capsys, run_of("Complex"), "--to", "torch-export", "--output", tmp_path / "out")
    assert code == 0 and said.count("parity") == 2, errors
    ones = torch.ones(2, 2, dtype=torch.complex64)
    assert compared({2: [ones]}, {2: [ones + 1j]})[1] == pytest.approx(1)
    assert compared({2: [ones]}, {2: [ones.real]})[1] == float("inf")


def test_a_network_that_draws_random_numbers_is_said_to(run_of, tmp_path, capsys, monkeypatch):
    run = run_of("Drawing")
    code, said, errors = exported(capsys, run, "--to", "torch-export", "--output", tmp_path / "out")
    assert code == 0 and "note     the network draws random numbers" in said, errors
    monkeypatch.setattr("nndist.trained.export.module_answer", lambda network: lambda given: [network(*given)])
    code, _, errors = exported(capsys, run, "--to", "torch-export", "--output", tmp_path / "out")
    assert code == 1 and len(errors) == 1 and "draws random numbers" in errors[0] and "differ" not in errors[0]


def test_extra_state_is_left_out_of_safetensors(run_of, tmp_path, capsys):
    code, said, errors = exported(capsys, run_of("Extra"), "--to", "safetensors", "--output", tmp_path / "out")
    assert code == 0, errors
    assert "left out is _extra_state" in said and load_file(tmp_path / "out").keys() == {"weight", "bias"}


def test_the_score_of_an_export_has_what_data_set_on_the_recipe(tmp_path, capsys):
    text = (ROOT / "tests/toys.py").read_text() + (
        "\n\nclass Double:\n    def __call__(self, x):\n        return x * 2\n"
        "\n\n@dataclass(kw_only=True)\nclass Doubled(Line):\n"
        "    def data(self, config):\n        self.double = Double()\n        return super().data(config)\n"
        "    def loss(self, networks, batch):\n        x, y = batch\n"
        "        return super().loss(networks, (self.double(x), y))\n"
    )
    (tmp_path / "doubled.py").write_text(text)
    run = nndist.train(f"{tmp_path}/doubled.py:Doubled", run="it", runs_dir=tmp_path / "runs", **QUIET, max_steps=2)
    code, said, errors = exported(capsys, run.folder, "--to", "safetensors", "--output", tmp_path / "out")
    assert code == 0 and said.count("parity") == 2, errors
