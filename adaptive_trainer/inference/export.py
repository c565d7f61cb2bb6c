"""A trained network for other programs: a torch.export program, ONNX where its packages are, and how to use them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from adaptive_trainer.config.schema import with_usual
from adaptive_trainer.errors import ConfigError, ModelError, UserError, explained
from adaptive_trainer.inference.model import Trained
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.utils.files import as_json, refused_by_disk, replacing

PROGRAM, ONNX, ABOUT = "model.pt2", "model.onnx", "model.json"
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # the extra `onnx`
INPUT, OUTPUT = "images", "scores"
TOLERANCE = {"absolute": 1e-4, "relative": 1e-4}  # of each score: absolute + relative * |score|
LARGEST = 2**31  # bytes of weights: protobuf, which ONNX is written by, holds less
SIZES = (2, 1, 5)  # images in the batches that are compared, the first of which is traced

Run = Callable[[Tensor], Tensor]


class Exported(NamedTuple):
    """What an export has come to.

    Attributes:
        differences: by the name of each file, the largest difference of a score.
        no_onnx: why there is no ONNX, in words; empty where there is.
    """

    differences: dict[str, float]
    no_onnx: str


def export(trained: Trained, folder: Path) -> Exported:
    """Write model.pt2, model.json and, where the packages of the extra `onnx` are installed and can do it, model.onnx.

    Each is run on the CPU, on batches of several sizes, before it is written: its scores must be the network's, within
    `TOLERANCE`. They take the place of an earlier export all at once; where there is an error it stays as it was.

    Raises:
        ModelError: the network cannot be exported, or what was exported gives other scores.
        ConfigError: the folder cannot be written.
    """

    def said(error: UserError) -> UserError | None:
        left = [name for name in (PROGRAM, ONNX) if (folder / name).exists()]
        return type(error)(f"{error}. {' and '.join(left)} in {folder} stay from an earlier export") if left else None

    with explained(said, (UserError,)):
        return _export(trained, folder)


def _export(trained: Trained, folder: Path) -> Exported:
    size = trained.data.image_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, size, size, generator=generator) for count in SIZES]
    with explained(lambda error: _refused(trained, error)), torch.no_grad():  # which fails with every kind of error
        program = torch.export.export(trained.network, (batches[0],), dynamic_shapes=({0: Dim("batch")},))
        files = {PROGRAM: _as_bytes(program)}
        with warnings.catch_warnings():  # torch's own, of the bytes that it reads
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            loaded = torch.export.load(io.BytesIO(files[PROGRAM])).module()
    found = {PROGRAM: _difference(trained, loaded, batches, PROGRAM)}
    try:
        content = _as_onnx(program)
        found[ONNX] = _difference(trained, _onnx_session(content), batches, ONNX)
        files[ONNX], no_onnx = content, ""
    except ModelError as error:  # the program is as good
        no_onnx = str(error)
    files[ABOUT] = (as_json(_about(trained, found), indent=2) + "\n").encode()
    _write(files, folder)
    return Exported(found, no_onnx)


def _write(files: dict[str, bytes], folder: Path) -> None:
    with refused_by_disk(ConfigError, f"cannot write the export in {folder}"), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            file = stack.enter_context(replacing(folder / name))
            file.write(content)
            file.flush()
        if ONNX not in files:
            (folder / ONNX).unlink(missing_ok=True)  # of another network, which model.json does not describe


def missing() -> list[str]:
    """The packages that ONNX needs, and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def _refused(trained: Trained, error: Exception) -> ModelError:
    return ModelError(
        f"{trained.config.model.name} cannot be exported by torch.export: {_first_line(error)}. In Python, load_model "
        "gives the network as it is"
    )


def _as_bytes(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _as_onnx(program: ExportedProgram) -> bytes:
    if lacking := missing():
        raise ModelError(f"it needs {', '.join(lacking)}; pip install 'adaptive-trainer[onnx]'")
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size >= LARGEST:
        raise ModelError(f"the weights take {format_bytes(size)}, and a file of ONNX holds less than 2 GiB")
    with _of_onnx("torch.onnx cannot export the network"):
        made = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
        content: bytes = made.model_proto.SerializeToString()  # type: ignore[union-attr]
    return content


def _onnx_session(content: bytes) -> Run:
    with _of_onnx("onnxruntime does not load it"):
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        with _of_onnx("onnxruntime does not run it"):
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


def _of_onnx(what: str) -> AbstractContextManager[None]:
    """Say of any error that this was not possible, and what may help."""
    newer = "newer versions may: pip install --upgrade 'adaptive-trainer[onnx]'"
    return explained(lambda error: ModelError(f"{what}: {_first_line(error)}; {newer}"))


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
