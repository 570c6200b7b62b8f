"""Files from others never run code: nothing that could is imported, a pickle under any name is refused."""

import ast
import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from clinometer.lm.llama_files import import_llama
from clinometer.messages import InputError
from tests.fuzz.test_files import READERS as ALL

SOURCE = Path(__file__).parents[2] / "src"
FORBIDDEN = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
}
CALLS = {"eval", "exec", "compile", "__import__"}
RUNNERS = {"InteractiveInterpreter", "InteractiveConsole"}
METHODS = {
    ("torch", "load"),
    ("torch", "save"),
    ("np", "load"),
    ("numpy", "load"),
    ("np", "fromfile"),
    ("jit", "load"),
    ("os", "system"),
    ("distributed_checkpoint", "load"),
    ("dcp", "load"),
}
OURS = {
    ("commands/helpers/targets.py", "spec_from_file_location"),
    ("lessons/page_session.py", "compile"),
    ("lessons/page_session.py", "InteractiveInterpreter"),
}
"""`clinometer check file.py:function` runs the file that is named: that is what it is for. `clinometer learn`
runs the lessons that came with the package, block by block."""


def test_nothing_that_runs_what_it_reads_is_imported_or_called():
    paths = sorted((SOURCE / "clinometer").rglob("*.py"))
    assert len(paths) > 100
    for path in paths:
        name = path.relative_to(SOURCE / "clinometer").as_posix()
        assert dangers(path.read_text(encoding="utf-8"), name) == [], name


def dangers(text, name):
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN]
            found += [a.name for a in node.names if a.name.startswith("torch.distributed.checkpoint")]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in FORBIDDEN or module.startswith("torch.distributed.checkpoint"):
                found.append(module)
            found += [a.name for a in node.names if a.name in RUNNERS and (name, a.name) not in OURS]
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS and (name, called.id) not in OURS:
                found.append(called.id)
            if isinstance(called, ast.Attribute):
                holder = called.value
                last = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
                if (last, called.attr) in METHODS:
                    found.append(f"{last}.{called.attr}")
                if called.attr == "spec_from_file_location" and (name, called.attr) not in OURS:
                    found.append(called.attr)
            found += [
                word.arg
                for word in node.keywords
                if (word.arg in ("allow_pickle", "trust_remote_code", "shell"))
                and getattr(word.value, "value", None) is not False
            ]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed.checkpoint as dcp",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "numpy.lib.format.read_array(file, allow_pickle=True)",
        "yaml.load(text)",
        "import yaml",
        "eval(text)",
        "exec(text)",
        "from code import InteractiveInterpreter",
        "importlib.util.spec_from_file_location('x', path)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    if line != "yaml.load(text)":  # without the import it is a name of somebody else
        assert dangers(line, "x.py")


class Payload:
    """Unpickled, it makes a file: the proof that code ran."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def plain(payload):
    return pickle.dumps(payload)


def of_torch(payload):
    file = io.BytesIO()
    torch.save({"model": payload}, file)
    return file.getvalue()


def of_torch_long_ago(payload):
    file = io.BytesIO()
    torch.save({"model": payload}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def of_numpy(payload):
    file = io.BytesIO()
    np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    return file.getvalue()


def in_an_archive(payload):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
        archive.writestr("../../escaped.txt", "out")
    return file.getvalue()


def as_text(payload):
    """Protocol 0, which is letters."""
    return pickle.dumps(payload, protocol=0)


KINDS = (plain, of_torch, of_torch_long_ago, of_numpy, in_an_archive, as_text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_do_run_where_somebody_unpickles(tmp_path, kind):
    mark = tmp_path / "ran"
    data = kind(Payload(mark))
    if kind in (plain, as_text):
        pickle.loads(data)
    elif kind is of_numpy:
        np.load(io.BytesIO(data), allow_pickle=True)
    elif kind is in_an_archive:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            pickle.loads(archive.read("archive/data.pkl"))
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert mark.exists()


READERS = [reader for reader in ALL if reader != "corpus"]  # a text may be anything


UNREAD = {("run", "config.toml"), ("run", "metrics.jsonl")}
"""The first is looked for and not read; a line without an end was cut short by a kill, and is left out."""


@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_in_place_of_any_file_never_runs(made, asking, tmp_path, reader):
    """Each kind under each name that the reader opens; sums put right, as a hostile hand would."""
    folder, mark = tmp_path / "inside" / "folder", tmp_path / "ran"
    shutil.copytree(made[reader].good, folder)
    whole = asking.ask(reader, folder)
    for name in sorted(made[reader].files):
        for kind in KINDS:
            (folder / name).write_bytes(kind(Payload(mark)))
            made[reader].seal(folder)
            refused = asking.ask(reader, folder, tmp_path / "inside") < whole
            assert not mark.exists(), (name, kind)
            assert refused or (reader, name) in UNREAD, (name, kind)
        shutil.rmtree(folder)
        shutil.copytree(made[reader].good, folder)
    assert not (tmp_path / "escaped.txt").exists()


def test_a_pickle_beside_the_files_of_a_checkpoint_is_not_looked_at(made, tmp_path):
    """As torch.distributed.checkpoint has it: `.metadata` is a pickle, also beside safetensors."""
    folder, mark = tmp_path / "folder", tmp_path / "ran"
    shutil.copytree(made["parts"].good, folder)
    (saved,) = folder.glob("step-*")
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (saved / name).write_bytes(plain(Payload(mark)))
    assert made["parts"].ask(folder) == 1
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("kind", [of_torch, of_torch_long_ago])
def test_a_hugging_face_folder_of_pickles_is_refused_with_the_remedy(made, tmp_path, name, kind):
    folder, mark = tmp_path / "folder", tmp_path / "ran"
    shutil.copytree(made["llama"].good, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(kind(Payload(mark)))
    with pytest.raises(InputError) as caught:
        import_llama(folder)
    assert caught.value.key == "export.pickle"
    assert name in str(caught.value)
    assert "safetensors" in str(caught.value)
    assert "safetensors" in caught.value.render("zh")
    assert not mark.exists()


def test_an_index_that_names_pickles_or_leads_out_is_refused(made, tmp_path):
    mark = tmp_path / "ran"
    outside = tmp_path / "outside.safetensors"
    for place in ("pytorch_model.bin", "../outside.safetensors", str(outside), "..", "", "n" * 5000):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made["sharded"].good, folder)
        shutil.copy(made["llama"].good / "model.safetensors", outside)
        (folder / "pytorch_model.bin").write_bytes(of_torch(Payload(mark)))
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", place))
        with pytest.raises(InputError):
            import_llama(folder)
        assert not mark.exists()
