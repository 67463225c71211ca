"""Make `import torchvision` work where its compiled operators do not fit the installed torch."""

import glob
import importlib.util
import os

import torch

_SCHEMAS: list[torch.library.Library] = []  # a Library's definitions live as long as the object


def prepare_torchvision() -> None:
    """Declare the two operators that torchvision looks up at import, if its compiled library cannot be loaded.

    PyPI's torchvision is built against CUDA; beside a CPU build of torch, importing it (as open_clip and timm do) fails
    with "operator torchvision::nms does not exist". The transforms need none of the compiled operators.
    """
    if _SCHEMAS or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return
    for library in glob.glob(os.path.join(os.path.dirname(spec.origin), "_C*.so")):
        try:
            torch.ops.load_library(library)
            return
        except OSError:
            continue
    schemas = torch.library.Library("torchvision", "DEF")
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS.append(schemas)
