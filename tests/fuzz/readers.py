"""Everything that Clinometer reads from others, each with a good example and what a user does with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from clinometer.lm.generate import generate
from clinometer.lm.llama_files import export_llama, import_llama
from clinometer.lm.model import TransformerLM
from clinometer.optim.make_optimizers import make_optimizers
from clinometer.record.read.reader import RunFile
from clinometer.record.replays.replays import KINDS, Replay
from clinometer.text.corpus import open_corpus
from clinometer.text.token_shards import TokenData
from clinometer.text.tokenizer import Tokenizer, from_gpt2_files, train_bpe
from clinometer.training.checkpoints import checkpoint
from clinometer.training.checkpoints.generator_state import restore_random_state
from clinometer.training.ranks.rows import rows_of
from clinometer.training.replay.replay import replay_step
from clinometer.training.run import prepare
from clinometer.training.run.load_run import load_run
from clinometer.training.run.loop import train
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import config_from
from clinometer.training.settings.settings_file import read_toml
from tests.fuzz import edits
from tests.fuzz.guard import answered
from tests.record.synthetic import synthetic
from tests.record.test_damage import ASKED
from tests.training.conftest import SENTENCES, Silent, small_config

TRAINED = small_config(Path("corpus.txt")).model.transformer(257)
Edit = Callable[[bytes, Any], bytes]


@dataclass(frozen=True)
class Reader:
    """A folder as it should be, the files in it that are edited, and the questions put to the result."""

    good: Path
    files: dict[str, Edit]
    ask: Callable[[Path], int]
    """How many of its questions were answered."""
    seal: Callable[[Path], None] = lambda folder: None
    """Puts the sums right that a hostile hand would put right too."""


def edited_toml(data: bytes, changes: list[tuple[str, list[float], Any]]) -> bytes:
    """Values of a TOML file replaced by others as TOML spells them; what it cannot spell, as JSON does."""
    import tomllib

    import tomli_w

    value = edits.edited_value(tomllib.loads(data.decode()), changes)
    try:
        return tomli_w.dumps(value).encode("utf-8", "surrogatepass")
    except (TypeError, AttributeError, ValueError):
        return json.dumps(value).encode("utf-8", "surrogatepass")


def edited_lines(data: bytes, changes: list[tuple[str, list[float], Any]]) -> bytes:
    """One JSON value a line, edited together."""
    rows = edits.edited_value([json.loads(line) for line in data.splitlines()], changes)
    return b"".join(json.dumps(row).encode() + b"\n" for row in (rows if isinstance(rows, list) else [rows]))


def make(root: Path) -> dict[str, Reader]:
    """The readers, with one small trained run behind them, which is made here."""
    corpus = root / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
    run = root / "run"
    session = prepare.start(small_config(corpus), run, Silent())
    try:
        train(session, Silent())
        shards = session.data.folder
    finally:
        session.close()
    replay_step(run, 9, lambda stage, done, total: None)
    (root / "replay").mkdir()
    shutil.copytree(next((run / "replays").glob("step-*")), root / "replay", dirs_exist_ok=True)
    shutil.rmtree(run / "replays")
    shutil.copytree(shards, root / "shards")
    saved = checkpoint.checkpoints(run / "checkpoints")[-1]
    shutil.copytree(saved, root / "saved" / saved.name)
    synthetic(root / "record", steps=40, layers=1)
    (root / "folder").mkdir()
    for name in ("config.toml", "environment.json", "metrics.jsonl"):
        shutil.copy(run / name, root / "folder" / name)
    shutil.copytree(run / "tokenizer", root / "folder" / "tokenizer")
    shutil.copytree(saved, root / "folder" / "checkpoints" / saved.name)
    trained = load_run(run)
    export_llama(trained.model, trained.model.config, root / "llama")
    _sharded(root / "llama", root / "sharded")
    _in_parts(saved, root / "parts" / saved.name)
    bpe = train_bpe([corpus.read_text(encoding="utf-8")], 300)
    bpe.save(root / "bpe")
    _gpt2_files(root / "bpe", root / "gpt2")
    (root / "text").mkdir()
    shutil.copy(corpus, root / "text" / "corpus.txt")
    return described(root)


def described(root: Path) -> dict[str, Reader]:
    """The readers of what `make` has made in `root`."""
    (saved,) = (root / "saved").iterdir()
    parts = [
        f"{saved.name}/{path.name}" for path in sorted((root / "parts" / saved.name).glob("*.safetensors"))
    ]
    tensors, value, toml = edits.edited_safetensors, edits.edited_json, edited_toml
    return {
        "config": Reader(root / "folder", {"config.toml": toml}, partial(_ask, [_config])),
        "tokenizer": Reader(root / "bpe", {"tokenizer.json": value}, partial(_ask, [_tokenizer])),
        "gpt2": Reader(
            root / "gpt2", {"vocab.json": value, "merges.txt": edits.as_bytes}, partial(_ask, [_gpt2])
        ),
        "shards": Reader(
            root / "shards",
            {"header.json": value, "train-00000.bin": edits.as_bytes, "validation-00000.bin": edits.as_bytes},
            partial(_ask, [_shards, _verified]),
        ),
        "checkpoint": Reader(
            root / "saved",
            {
                f"{saved.name}/state.json": value,
                f"{saved.name}/model.safetensors": tensors,
                f"{saved.name}/optimizer.safetensors": tensors,
            },
            partial(_ask, [_checkpoint]),
            _seal_checkpoint,
        ),
        "parts": Reader(
            root / "parts",
            {f"{saved.name}/state.json": value, **dict.fromkeys(parts, tensors)},
            partial(_ask, [_checkpoint]),
            _seal_checkpoint,
        ),
        "run": Reader(
            root / "folder",
            {
                "config.toml": toml,
                "metrics.jsonl": edited_lines,
                "tokenizer/tokenizer.json": value,
                f"checkpoints/{saved.name}/state.json": value,
                f"checkpoints/{saved.name}/model.safetensors": tensors,
            },
            partial(_ask, [_run, _metrics]),
            _seal_checkpoint,
        ),
        "llama": Reader(
            root / "llama", {"config.json": value, "model.safetensors": tensors}, partial(_ask, [_llama])
        ),
        "sharded": Reader(
            root / "sharded",
            {"model.safetensors.index.json": value, "model-00001-of-00002.safetensors": tensors},
            partial(_ask, [_llama]),
        ),
        "replay": Reader(
            root / "replay",
            {"step.json": value, "tensors.safetensors": tensors, "tokens.safetensors": tensors},
            _replay,
            _seal_replay,
        ),
        "record": Reader(root / "record", {"run.sqlite": edits.as_bytes}, _record),
        "corpus": Reader(root / "text", {"corpus.txt": edits.as_bytes}, partial(_ask, [_corpus])),
    }


def _ask(questions: list[Callable[[Path], object]], folder: Path) -> int:
    return sum(answered(partial(question, folder)) for question in questions)


def _config(folder: Path) -> object:
    config = config_from(read_toml(folder / "config.toml"))
    assert config_from(read_toml_of(config.to_toml(), folder)) == config
    return config


def read_toml_of(text: str, folder: Path) -> Any:
    path = folder / "again.toml"
    path.write_text(text, encoding="utf-8")
    return read_toml(path)


def _tokenizer(folder: Path) -> object:
    tokenizer = Tokenizer.load(folder)
    return _use(tokenizer)


def _use(tokenizer: Tokenizer) -> object:
    text = "the quick brown fox 梯度 <|endoftext|>\n" * 40
    ids = tokenizer.encode(text)
    assert tokenizer.mergeable_ranks is None or len(tokenizer.mergeable_ranks) > 0
    assert len(tokenizer.hash) > 8
    stream = tokenizer.decode_stream()
    for token in ids[:50]:
        stream.push(token)
        tokenizer.token_bytes(token)
    return tokenizer.decode(ids) + stream.finish()


def _gpt2(folder: Path) -> object:
    return _use(from_gpt2_files(folder / "vocab.json", folder / "merges.txt"))


def _shards(folder: Path) -> object:
    data = TokenData.open(folder)
    for side in (data.train, data.validation):
        ids = side[: min(len(side), 1000)]
        assert not len(ids) or int(np.max(ids)) < data.header.vocab_size
        side[max(0, len(side) - 7) :]
    return data


def _verified(folder: Path) -> object:
    data = TokenData.open(folder)
    data.verify()
    return data


def _checkpoint(folder: Path) -> object:
    (path,) = folder.glob("step-*")
    model = TransformerLM(TRAINED, generator=torch.Generator().manual_seed(0))
    optimizers = make_optimizers(model.named_parameters(), name="adamw", lr=1e-2)
    state = checkpoint.load_checkpoint(path, model, optimizers)
    now = torch.get_rng_state()
    try:
        restore_random_state(state["random"])
    finally:
        torch.set_rng_state(now)
    return state


def _run(folder: Path) -> object:
    trained = load_run(folder)
    ids = torch.tensor([trained.tokenizer.encode("the quick")[:8] or [0]])
    if int(ids.max()) < trained.model.config.vocab_size:
        with torch.no_grad():
            trained.model(ids)
            for _ in generate(trained.model, ids, max_new_tokens=33, seed=0):
                pass
    return trained


def _metrics(folder: Path) -> object:
    return sum(1 for _row in RunFolder.open(folder).metrics())


def _llama(folder: Path) -> object:
    config, weights = import_llama(folder)
    model = TransformerLM(config)
    model.load_state_dict(weights)
    return model


def _replay(folder: Path) -> int:
    done = 0
    replay = Replay.at(folder)
    if replay is None:
        return 0
    for name in [*replay.names[:3], ""]:
        for question in (
            *(partial(replay.matrix, name, kind, height=7, width=5) for kind in KINDS),
            partial(replay.entry, name, [0, 0]),
            partial(replay.entry, name, [0]),
            partial(replay.token, 0, 0),
            partial(replay.weight, name, [0, 0]),
        ):
            try:
                done += answered(question)
            except (KeyError, IndexError):  # its documented way to say that there is none
                continue
    return done


def _record(folder: Path) -> int:
    opened: list[RunFile] = []
    if not answered(lambda: opened.append(RunFile.open(folder))):
        return 0
    try:
        return sum(answered(partial(question, opened[0])) for question in ASKED)
    finally:
        opened[0].close()


def _corpus(folder: Path) -> object:
    return sum(len(text) for text in open_corpus(folder / "corpus.txt").documents())


def _seal_checkpoint(folder: Path) -> None:
    for file in folder.rglob("state.json"):
        try:
            state = json.loads(file.read_bytes())
            for name in state["files"]:
                if (file.parent / name).is_file():
                    state["files"][name] = checkpoint.fingerprint(file.parent / name)
            state.pop("sha256", None)
            state["sha256"] = checkpoint.digest(state)
            file.write_text(json.dumps(state))
        except (ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError):
            continue


def _seal_replay(folder: Path) -> None:
    try:
        info = json.loads((folder / "step.json").read_bytes())
        for name in info["files"]:
            content = (folder / name).read_bytes()
            info["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "step.json").write_text(json.dumps(info))
    except (ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError):
        return


def _in_parts(saved: Path, folder: Path) -> None:
    """The same checkpoint as two ranks that hold tensors in rows write it."""
    folder.mkdir(parents=True)
    state = json.loads((saved / "state.json").read_bytes())
    split: dict[str, dict[str, list[int]]] = {}
    for kind in ("model", "optimizer"):
        held = load_file(saved / f"{kind}.safetensors")
        split[kind] = {name: list(tensor.shape) for name, tensor in held.items() if tensor.dim()}
        for rank in range(2):
            mine = {
                name: tensor[slice(*rows_of(len(tensor), rank, 2))].clone() if tensor.dim() else tensor
                for name, tensor in held.items()
                if tensor.dim() or rank == 0
            }
            save_file(mine, folder / f"{kind}-{rank + 1:05}-of-00002.safetensors")
    state["format"] = checkpoint.IN_PARTS
    state["parts"] = {"count": 2, "split": split}
    state["files"] = {path.name: checkpoint.fingerprint(path) for path in folder.glob("*.safetensors")}
    state.pop("sha256")
    state["sha256"] = checkpoint.digest(state)
    (folder / "state.json").write_text(json.dumps(state))


def _sharded(whole: Path, folder: Path) -> None:
    """The same Llama in two files and an index."""
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    held = load_file(whole / "model.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(held))}
    for place in set(places.values()):
        save_file({name: held[name] for name in held if places[name] == place}, folder / place)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _gpt2_files(source: Path, folder: Path) -> None:
    model = json.loads((source / "tokenizer.json").read_bytes())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
