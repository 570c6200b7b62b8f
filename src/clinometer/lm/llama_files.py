"""To and from Hugging Face's Llama layout on disk (`llama.py` describes the layout).

An export is a folder that transformers' AutoModelForCausalLM opens: config.json, generation_config.json,
model.safetensors. It gets its name when its last byte is on the disk: there is no half-written export.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clinometer.foreign_files import parse_json
from clinometer.lm import llama
from clinometer.lm.functional import check_weights
from clinometer.lm.transformer_config import RMS_NORM_EPS, TransformerConfig
from clinometer.messages import InputError
from clinometer.whole_files import commit_folder, sync_file

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WRITTEN_BY = {"format": "pt", "written_by": "clinometer"}
"""The header of our safetensors files: transformers needs the format, and the other marks our own."""

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def export_llama(
    model_or_weights: nn.Module | Mapping[str, Tensor],
    config: TransformerConfig,
    folder: str | Path,
    *,
    end_of_text_id: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    also: Callable[[Path], object] | None = None,
) -> Path:
    """Write the model as a LlamaForCausalLM with the same logits; return the folder.

    `dtype` None keeps the weights' own (the widest, if they differ). `end_of_text_id` becomes the id where
    transformers' `generate` stops. `also` is called with the unfinished folder and may put more files there
    (the tokenizer's). `overwrite` replaces an earlier export.

    Raises `InputError` for weights that do not fit `config`, and for a folder that holds anything else
    than an earlier export, or one without `overwrite`.
    """
    folder = Path(folder).resolve()
    try:
        _check_target(folder, overwrite)
    except OSError as error:
        raise InputError("export.cannot_write", path=folder, reason=error.strerror or error) from error
    V = config.vocab_size
    if end_of_text_id is not None and not 0 <= end_of_text_id < V:
        raise InputError("export.end_of_text", value=end_of_text_id, vocab_size=V, last=V - 1)
    weights = model_or_weights.state_dict() if isinstance(model_or_weights, nn.Module) else model_or_weights
    check_weights(weights, config)
    unknown = [name for name in weights if name not in config.weight_shapes()]
    if unknown:
        raise InputError("export.unknown_weight", name=unknown[0], count=_more(unknown))
    dtype = _widest(weights.values()) if dtype is None else dtype
    if dtype not in FLOATS:
        raise InputError("export.dtype", given=str(dtype), known=", ".join(map(str, FLOATS)))

    tensors = {}
    for name in config.weight_shapes():
        weight = weights[name].detach()
        if llama.is_rotated(name):
            weight = llama.halves_from_pairs(weight, config.num_heads)
        # A copy each: safetensors rejects tensors that share memory, as a tied head does.
        tensors[llama.llama_name(name)] = weight.to("cpu", dtype, copy=True).contiguous()
    # As padding too: transformers falls back to it anyway, with a warning each time.
    roles = () if end_of_text_id is None else ("bos_token_id", "eos_token_id", "pad_token_id")
    end: dict[str, Any] = dict.fromkeys(roles, end_of_text_id)

    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        _write_json(unfinished / CONFIG_FILE, llama.llama_config(config, dtype, end_of_text_id))
        _write_json(unfinished / GENERATION_FILE, end)
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata=WRITTEN_BY)
        # safetensors lets only its owner read it; it gets the mode the user's umask gives to files.
        (unfinished / WEIGHTS_FILE).chmod((unfinished / CONFIG_FILE).stat().st_mode & 0o777)
        if also is not None:
            also(unfinished)
        for file in filter(Path.is_file, unfinished.rglob("*")):
            sync_file(file)
        commit_folder(unfinished, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError("export.cannot_write", path=folder, reason=reason) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def import_llama(folder: str | Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read a Llama checkpoint: `transformer_lm(weights, token_ids, config)` gives its logits.

    What `export_llama` wrote comes back bit for bit. Grouped-query keys and values are repeated for every
    head, a tied head is copied, norms of another ε are folded into the weights (`rescale_residual`), mixed
    precisions become the widest: all exact, or to float32's rounding. Reads safetensors, one file or
    sharded; never unpickles.

    Raises `InputError` for what our model cannot represent, and for files that are missing or broken.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError("export.not_folder", path=folder)
    description = _read_json(folder / CONFIG_FILE, "export.no_config")
    config, num_kv_heads, eps, tied = llama.read_llama_config(description, folder / CONFIG_FILE)
    stored = _read_tensors(folder)
    # First the number of layers: the list of its weights has to be made for the rest.
    if config.num_layers > len(stored):
        names = (llama.llama_name(f"layers.{i}.ln1.weight") for i in range(config.num_layers))
        raise InputError("export.tensor_missing", path=folder, name=next(n for n in names if n not in stored))

    weights = {}
    for name, shape in config.weight_shapes().items():
        theirs = llama.llama_name(name)
        if tied and theirs not in stored and name in ("token_embeddings.weight", "lm_head.weight"):
            other = "lm_head.weight" if name == "token_embeddings.weight" else "token_embeddings.weight"
            theirs = llama.llama_name(other)
        if theirs not in stored:
            raise InputError("export.tensor_missing", path=folder, name=theirs)
        grouped = name.endswith(("attn.k_proj.weight", "attn.v_proj.weight"))
        expected = (num_kv_heads * config.head_dim, config.d_model) if grouped else shape
        weight = stored[theirs]
        if tuple(weight.shape) != expected:
            raise InputError(
                "export.tensor_shape", path=folder, name=theirs, shape=tuple(weight.shape), expected=expected
            )
        if weight.dtype not in FLOATS:
            raise InputError("export.tensor_dtype", path=folder, name=theirs, given=str(weight.dtype))
        if llama.is_rotated(name):
            weight = llama.pairs_from_halves(weight, num_kv_heads if grouped else config.num_heads)
        if grouped:
            weight = llama.repeat_heads(weight, num_kv_heads, config.num_heads)
        weights[name] = weight
    known = {llama.llama_name(name) for name in config.weight_shapes()}
    # Old checkpoints keep RoPE's frequencies, which follow from theta.
    unknown = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise InputError("export.tensor_unknown", path=folder, name=unknown[0], count=_more(unknown))

    dtype = _widest(weights.values())
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if eps != RMS_NORM_EPS:
        weights = llama.rescale_residual(weights, eps)
    # Memory of their own: not the file's, not each other's.
    return config, {
        name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()
    }


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError("export.not_a_folder_here", path=folder)
    found = sorted(entry.name for entry in folder.iterdir())
    if not found:
        return
    ours = {CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE} | TOKENIZER_FILES
    foreign = [name for name in found if name not in ours]
    if foreign or not _is_export(folder):
        raise InputError("export.foreign_folder", path=folder, name=(foreign or found)[0])
    if not overwrite:
        raise InputError("export.exists", path=folder)


def _is_export(folder: Path) -> bool:
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return (file.metadata() or {}).get("written_by") == WRITTEN_BY["written_by"]
    except (OSError, SafetensorError):
        return False


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by Llama's names."""
    if (folder / WEIGHTS_FILE).exists():
        return _read_safetensors(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).exists():
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth")) + sorted(folder.glob("*.pt"))
        if pickles:
            raise InputError("export.pickle", path=folder, name=pickles[0].name)
        raise InputError("export.no_weights", path=folder)
    places = _read_json(folder / INDEX_FILE, "export.no_weights").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError("export.config_field", path=folder / INDEX_FILE, field="weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:  # a downloaded index must not name a file outside its folder
            raise InputError("export.shard_path", path=folder / INDEX_FILE, name=shard)
        if not os.path.isfile(folder / shard):  # exists() raises for a name that is too long
            raise InputError("export.shard_missing", path=folder, name=shard[:200])
        tensors |= _read_safetensors(folder / shard)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise InputError("export.file_broken", path=path, reason=error) from error


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(missing, path=path.parent) from None
    except (OSError, ValueError) as error:
        raise InputError("export.file_broken", path=path, reason=error) from error
    if not isinstance(content, dict):
        raise InputError("export.file_broken", path=path, reason=type(content).__name__)
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    dtypes = list({tensor.dtype for tensor in tensors})
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _more(names: list[str]) -> str:
    return f" (+{len(names) - 1})" if len(names) > 1 else ""
