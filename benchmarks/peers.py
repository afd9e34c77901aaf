"""The PyTorch sides: a plain model, timm's and that of transformers, eager or compiled. Started by sides.py.

Runs in an interpreter that need not have JAX.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import work as works
from child import resident_mb, serve
from torch import nn
from work import Work

FIRST = 3  # number of steps whose losses are reported
GELU = functools.partial(nn.GELU, approximate="tanh")


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})
        self.gelu = GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        fused = self.attn["qkv"](self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        mixed = nn.functional.scaled_dot_product_attention(*fused.permute(2, 0, 3, 1, 4))
        x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["fc2"](self.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainViT(nn.Module):
    """A straightforward Vision Transformer in PyTorch's own layers; parameters are named as in timm."""

    def __init__(self, work: Work):
        super().__init__()
        width, patch = work.width, work.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, work.tokens(), width))
        self.blocks = nn.Sequential(*(Block(width, work.heads, work.mlp_width) for _ in range(work.depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, work.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def timm_model(work: Work) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": work.width, "depth": work.depth, "num_heads": work.heads}
    sizes |= {"mlp_ratio": work.mlp_width / work.width, "num_classes": work.classes, "act_layer": GELU}
    return VisionTransformer(img_size=work.image_size, patch_size=work.patch_size, **sizes)


class TransformersModel(nn.Module):
    """The classifier of transformers; returns only logits."""

    def __init__(self, work: Work):
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=work.width,
            num_hidden_layers=work.depth,
            num_attention_heads=work.heads,
            intermediate_size=work.mlp_width,
            image_size=work.image_size,
            patch_size=work.patch_size,
            num_labels=work.classes,
            hidden_act="gelu_pytorch_tanh",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        self.model = ViTForImageClassification(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).logits


MODELS: dict[str, Callable[[Work], nn.Module]] = {
    "torch": PlainViT,
    "timm": timm_model,
    "transformers": TransformersModel,
}


def timm_names(flat: dict[str, np.ndarray], work: Work) -> dict[str, np.ndarray]:
    """The parameters by their names in timm; kernels are [outputs, inputs]."""
    named = {"cls_token": flat["class_token"], "pos_embed": flat["positions/table"]}

    def layer(ours: str, theirs: str) -> None:
        if f"{ours}/scale" in flat:
            named[f"{theirs}.weight"] = flat[f"{ours}/scale"]
        else:
            named[f"{theirs}.weight"] = flat[f"{ours}/kernel"].T
        named[f"{theirs}.bias"] = flat[f"{ours}/bias"]

    layer("embedding/projection", "patch_embed.proj")
    # The kernel's rows are in the order row, column, channel.
    patch = work.patch_size
    kernel = named["patch_embed.proj.weight"].reshape(work.width, patch, patch, 3)
    named["patch_embed.proj.weight"] = kernel.transpose(0, 3, 1, 2)
    parts = {"norm_attention": "norm1", "norm_mlp": "norm2", "attention/qkv": "attn.qkv", "attention/out": "attn.proj"}
    for index in range(work.depth):
        for ours, theirs in {**parts, "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}.items():
            layer(f"encoder/block_{index}/{ours}", f"blocks.{index}.{theirs}")
    layer("encoder/norm", "norm")
    layer("head/logits", "head")
    return named


TRANSFORMERS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def transformers_names(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames parameters from timm's names to those of transformers 5."""
    renamed = {}
    for name, value in named.items():
        stem, _, kind = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        tail = f".{kind}" if kind else ""
        block, _, part = stem.removeprefix("blocks.").partition(".") if stem.startswith("blocks.") else ("", "", stem)
        above = f"model.vit.layers.{block}." if block else "model."
        if part == "attn.qkv":
            for letter, third in zip("qkv", np.split(value, 3), strict=True):
                renamed[f"{above}attention.{letter}_proj{tail}"] = third
        else:
            renamed[f"{above}{TRANSFORMERS[part]}{tail}"] = value
    return renamed


class Side:
    """A model with the common parameters on its device, and its report."""

    def __init__(self, work: Work):
        kind, _, mode = work.side.partition("_")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # As XLA does: float32 matmuls may use TF32 on tensor cores.
        torch.set_float32_matmul_precision("high")
        self.device = torch.device("cuda" if work.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=work.dtype == "bfloat16" or mode == "autocast"
        )
        model, named = MODELS[kind](work), timm_names(works.parameters(work), work)
        named = transformers_names(named) if kind == "transformers" else named
        model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in named.items()})
        self.parameters = model.to(self.device)
        images, labels = works.examples(work)
        images = np.ascontiguousarray(works.normalized(images).transpose(0, 1, 4, 2, 3))
        self.images, self.labels = (torch.from_numpy(a).to(self.device) for a in (images, labels.astype(np.int64)))
        self.model = torch.compile(model) if mode == "compile" else model

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def set_report(self, first: float, began: float, **more: Any) -> None:
        """`first`: seconds per step; `began`: when the first step began."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_mb()
        self.report = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "library": f"torch {torch.__version__}",
            # torch.compile compiles during the first steps.
            "compile_s": round(time.perf_counter() - began, 2),
            "step_s": first,
            "peak_memory_mb": round(peak),
            **more,
        }


class Training(Side):
    """Whole training steps with AdamW."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.model.train()
        settings = {"betas": works.BETAS, "eps": works.EPSILON, "weight_decay": works.WEIGHT_DECAY}
        self.optimizer = torch.optim.AdamW(self.parameters.parameters(), works.LEARNING_RATE, fused=True, **settings)
        self.num_steps, began = 0, time.perf_counter()
        first_values = [round(self._step().item(), 5) for _ in range(FIRST)]
        self.set_report(self.turn(1), began, losses=first_values)

    def _step(self) -> torch.Tensor:
        batch = self.num_steps % len(self.images)
        self.num_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            logits = self.model(self.images[batch])
        loss = nn.functional.cross_entropy(logits.float(), self.labels[batch])
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def turn(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self._step()
        self.wait()
        return time.perf_counter() - began


class Inference(Side):
    """Computes the logits of one batch; waits for every call."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.model.eval()
        began = time.perf_counter()
        with torch.inference_mode(), self.autocast:
            first_values = [round(value, 5) for value in self.model(self.images[0])[0, :3].float().tolist()]
        self.turn(2)
        self.set_report(self.turn(1)[0], began, logits=first_values)

    def turn(self, steps: int) -> list[float]:
        seconds = []
        with torch.inference_mode(), self.autocast:
            for _ in range(steps):
                began = time.perf_counter()
                self.model(self.images[0])
                self.wait()
                seconds.append(time.perf_counter() - began)
        return seconds


def make(work: Work) -> Side:
    return Inference(work) if work.mode == "infer" else Training(work)


if __name__ == "__main__":
    serve(make)
