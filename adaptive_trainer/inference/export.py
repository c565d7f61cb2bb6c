"""A trained network for other programs: a torch.export program, ONNX where its packages are, and how to use them."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from adaptive_trainer.config.schema import with_usual
from adaptive_trainer.errors import ConfigError, ModelError, explained
from adaptive_trainer.inference.model import Trained
from adaptive_trainer.utils.files import as_json, refused_by_disk, write_whole

PROGRAM, ONNX, ABOUT = "model.pt2", "model.onnx", "model.json"
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # the extra `onnx`
INPUT, OUTPUT = "images", "scores"
TOLERANCE = {"absolute": 1e-4, "relative": 1e-4}  # of each score: absolute + relative * |score|
SIZES = (2, 1, 5)  # images in the batches that are compared, the first of which is traced

Run = Callable[[Tensor], Tensor]


def export(trained: Trained, folder: Path) -> dict[str, float]:
    """Write model.pt2, model.json and, where the packages of the extra `onnx` are installed, model.onnx.

    Each is run on the CPU, on batches of several sizes, before it is written: its scores must be the network's, within
    `TOLERANCE`.

    Returns:
        By the name of each file, the largest difference of a score.

    Raises:
        ModelError: the network cannot be exported, or what was exported gives other scores.
        ConfigError: the folder cannot be written.
    """
    size = trained.data.image_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, size, size, generator=generator) for count in SIZES]
    program = _exported(trained, batches[0])
    files = {PROGRAM: _as_bytes(program)}
    loaded = torch.export.load(io.BytesIO(files[PROGRAM])).module()
    found = {PROGRAM: _difference(trained, loaded, batches, PROGRAM)}
    if not missing():
        files[ONNX] = _as_onnx(program)
        found[ONNX] = _difference(trained, _onnx_session(files[ONNX]), batches, ONNX)
    files[ABOUT] = (as_json(_about(trained, found), indent=2) + "\n").encode()
    with refused_by_disk(ConfigError, f"cannot write the export in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    return found


def missing() -> list[str]:
    """The packages that ONNX needs, and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def _exported(trained: Trained, images: Tensor) -> ExportedProgram:
    def refused(error: Exception) -> ModelError:
        return ModelError(f"{trained.config.model.name} cannot be exported by torch.export: {_first_line(error)}")

    with explained(refused), torch.no_grad():  # which fails with every kind of error
        return torch.export.export(trained.network, (images,), dynamic_shapes=({0: Dim("batch")},))


def _as_bytes(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _as_onnx(program: ExportedProgram) -> bytes:
    with explained(lambda error: ModelError(f"torch.onnx cannot export the network: {_first_line(error)}")):
        made = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    content: bytes = made.model_proto.SerializeToString()  # type: ignore[union-attr]
    return content


def _onnx_session(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@torch.no_grad()
def _difference(trained: Trained, run: Run, batches: list[Tensor], name: str) -> float:
    """The largest difference from the network's scores, which is within the tolerance."""
    most = 0.0
    for images in batches:
        wanted, got = trained.network(images), run(images)
        if got.shape != wanted.shape:
            raise ModelError(f"{name} gives scores of shape {tuple(got.shape)}, and the network {tuple(wanted.shape)}")
        difference = (got - wanted).abs()
        allowed = TOLERANCE["absolute"] + TOLERANCE["relative"] * wanted.abs()
        if not bool((difference <= allowed).all()):
            raise ModelError(
                f"{name} gives other scores than the network: they differ by {float(difference.max()):.3g}, and "
                f"{TOLERANCE['absolute']:g} + {TOLERANCE['relative']:g} * |score| is allowed"
            )
        most = max(most, float(difference.max()))
    return most


def _about(trained: Trained, found: dict[str, float]) -> dict[str, Any]:
    """What another program has to know."""
    data, size = with_usual(trained.data), trained.data.image_size
    preparation: dict[str, Any] = {"colours": "RGB", "scale": 1 / 255, "transforms": data.transforms, "size": size}
    if data.transforms != "none":  # which resizes both sides and does no more
        resized = round(size / (data.crop_pct or 1))
        sides = [resized, resized] if data.crop_mode == "squash" else resized  # a number: the shorter side
        preparation |= {"resize": sides, "interpolation": data.interpolation, "center_crop": size}
        preparation |= {"mean": data.mean, "std": data.std}
    return {
        "checkpoint": str(trained.path),
        "model": trained.config.model.name,
        "classes": trained.classes,
        "input": {"name": INPUT, "shape": ["batch", 3, size, size], "type": "float32", "preprocessing": preparation},
        "output": {"name": OUTPUT, "shape": ["batch", len(trained.classes)], "probabilities": "softmax"},
        "largest_difference": found,
        "tolerance": TOLERANCE,
        "versions": {"torch": torch.__version__},
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
