"""Makes the encoders' reference cases: `python tests/encoder_cases.py [FOLDER]`.

Needs torch, diffusers and transformers, which the tests do not: a case holds the names
and shapes of a published layout and what the reference implementation answers. The
weights themselves follow from their names, see `random_arrays`.
"""

from __future__ import annotations

import json
import pathlib
import sys
import zlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "encoders"

Shapes = dict[str, tuple[int, ...]]


def random_arrays(shapes: Shapes) -> dict[str, np.ndarray]:
    """Weights that are a function of their names, of about the size trained ones have.

    `RandomState` is frozen: it draws the same numbers in every version of NumPy.
    """
    arrays = {}
    for name, shape in shapes.items():
        normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) < 2:  # biases, norms and layer scales
            array = 0.1 * normal + (0.0 if name.endswith("bias") else 1.0)
        elif len(shape) == 3:  # tokens and positions
            array = normal
        else:
            array = normal / np.sqrt(np.prod(shape[1:]))
        arrays[name] = np.asarray(array, np.float32)
    return arrays


def read_case(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights of a stored case, and its inputs and outputs."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    shapes = json.loads(str(arrays.pop("shapes")))
    return random_arrays({k: tuple(v) for k, v in shapes.items()}), arrays


def inputs(name: str, *shape: int) -> np.ndarray:
    """Uniform numbers in [-1, 1]."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return state.uniform(-1, 1, shape).astype(np.float32)


# What follows needs torch. Cases are functions of nothing: shapes, inputs and outputs.


def tensors(shapes: Shapes) -> dict[str, Any]:
    """`random_arrays` as tensors."""
    import torch

    return {k: torch.from_numpy(v) for k, v in random_arrays(shapes).items()}


def shapes_of(state: dict[str, Any]) -> Shapes:
    """Shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def nchw(images: np.ndarray) -> Any:
    """Their axes."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def vae_case(widths: tuple[int, ...], blocks: int, side: int, layout: str) -> Any:
    """AutoencoderKL of diffusers, its weights named by either layout."""
    import torch
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = len(widths)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=blocks,
    ).eval()
    if layout == "compvis":
        shapes = compvis_shapes(widths, blocks)
        state = convert_ldm_vae_checkpoint(tensors(shapes), model.config)
    else:
        shapes = shapes_of(model.state_dict())
        state = tensors(shapes)
    model.load_state_dict(state)
    images = inputs("images", 2, side, side // 2, 3)
    latent = side >> (levels - 1)
    latents = inputs("latents", 2, latent, latent // 2, 4)
    with torch.no_grad():
        encoded = model.encode(nchw(images)).latent_dist.mean
        decoded = model.decode(nchw(latents)).sample
    return shapes, {
        "in/images": images,
        "in/latents": latents,
        "out/latents": encoded.permute(0, 2, 3, 1).numpy(),
        "out/images": decoded.permute(0, 2, 3, 1).numpy(),
    }


def compvis_shapes(widths: tuple[int, ...], blocks: int) -> Shapes:
    """Names and shapes of `ldm.models.autoencoder.AutoencoderKL` (CompVis)."""
    shapes: Shapes = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def block(name: str, before: int, after: int) -> None:
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.nin_shortcut", after, before, 1, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        add(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.attn_1.{part}", width, width, 1, 1)
        block(f"{name}.block_2", width, width)

    levels = range(len(widths))
    add("encoder.conv_in", widths[0], 3, 3, 3)
    for i in levels:
        for j in range(blocks):
            before = widths[max(i - 1, 0)] if j == 0 else widths[i]
            block(f"encoder.down.{i}.block.{j}", before, widths[i])
        if i < levels[-1]:
            add(f"encoder.down.{i}.downsample.conv", widths[i], widths[i], 3, 3)
    middle("encoder.mid", widths[-1])
    add("encoder.norm_out", widths[-1])
    add("encoder.conv_out", 8, widths[-1], 3, 3)
    add("decoder.conv_in", widths[-1], 4, 3, 3)
    middle("decoder.mid", widths[-1])
    for i in levels:
        for j in range(blocks + 1):
            before = widths[min(i + 1, levels[-1])] if j == 0 else widths[i]
            block(f"decoder.up.{i}.block.{j}", before, widths[i])
        if i > 0:
            add(f"decoder.up.{i}.upsample.conv", widths[i], widths[i], 3, 3)
    add("decoder.norm_out", widths[0])
    add("decoder.conv_out", 3, widths[0], 3, 3)
    add("quant_conv", 8, 8, 1, 1)
    add("post_quant_conv", 4, 4, 1, 1)
    return shapes


def dinov2_case(registers: int, layout: str, sides: tuple[int, int]) -> Any:
    """DINOv2 of transformers, its weights named by either published layout."""
    import torch
    from transformers import Dinov2Config, Dinov2Model
    from transformers import Dinov2WithRegistersConfig as RegistersConfig
    from transformers import Dinov2WithRegistersModel as RegistersModel

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"mlp_ratio": 2, "patch_size": 4, "image_size": 20}
    model = (
        RegistersModel(RegistersConfig(**sizes, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**sizes))
    ).eval()
    shapes = published_shapes(model)
    if layout == "facebook":
        names, shapes = list(shapes), facebook_shapes(shapes)
        original = tensors(shapes)
        state = {name: part_of(original[to_facebook(name)], name) for name in names}
        if not registers:
            interpolate = facebook_positions
            embeddings: Any = model.embeddings
            embeddings.interpolate_pos_encoding = lambda x, height, width: interpolate(
                embeddings.position_embeddings, height // 4, width // 4
            )
    else:
        state = tensors(shapes)
    load_published(model, state)
    images = inputs("images", 2, *sides, 3)
    with torch.no_grad():
        tokens = model(nchw(images)).last_hidden_state
    rows, columns = sides[0] // 4, sides[1] // 4
    patches = tokens[:, 1 + registers :].reshape(2, rows, columns, -1)
    return shapes, {
        "in/images": images,
        "out/image": tokens[:, 0].numpy(),
        "out/patches": patches.numpy(),
    }


def published_shapes(model: Any) -> Shapes:
    """Names and shapes as `save_pretrained` writes them, not as modules have them."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return shapes_of(load_file(f"{folder}/model.safetensors"))


def load_published(model: Any, state: dict[str, Any]) -> None:
    """Loads a state dict with the names that `save_pretrained` writes."""
    import tempfile

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        read = type(model).from_pretrained(folder)
    model.load_state_dict(read.state_dict())


RENAMED = {  # transformers -> facebook
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.attention.query": "attn.qkv",
    "attention.attention.key": "attn.qkv",
    "attention.attention.value": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def to_facebook(name: str) -> str:
    """The name in `dinov2.models`; that of queries, keys and values is one."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def facebook_shapes(shapes: Shapes) -> Shapes:
    """Names and shapes of `dinov2.models` for those of transformers."""
    renamed = {to_facebook(name): shape for name, shape in shapes.items()}
    return {
        name: (3 * shape[0], *shape[1:]) if "qkv" in name else shape
        for name, shape in renamed.items()
    }


def part_of(tensor: Any, name: str) -> Any:
    """The part of an original tensor that transformers calls `name`."""
    for i, part in enumerate(("query", "key", "value")):
        if f".{part}." in name:
            return tensor.chunk(3)[i]
    return tensor


def facebook_positions(positions: Any, rows: int, columns: int) -> Any:
    """The original interpolation of positions, where there are no registers."""
    import math

    import torch

    grid = math.isqrt(positions.shape[1] - 1)
    if rows == columns == grid:
        return positions
    scales = (rows + 0.1) / grid, (columns + 0.1) / grid
    patches = positions[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(
        patches, scale_factor=scales, mode="bicubic"
    )
    assert patches.shape[-2:] == (rows, columns)
    patches = patches.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
    return torch.cat([positions[:, :1], patches], dim=1)


def clip_case(layout: str, activation: str, projection: bool) -> Any:
    """CLIP's text encoder of transformers, its weights named by either layout."""
    import torch
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        hidden_act=activation,
        projection_dim=48,
        bos_token_id=38,
        eos_token_id=39,
        pad_token_id=39,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    model = kind(config).eval()
    shapes = openai_shapes() if layout == "openai" else published_shapes(model)
    state = tensors(shapes)
    if layout == "openai":
        state = convert_open_clip_checkpoint(model, state, prefix="")
    load_published(model, state)
    tokens = np.random.RandomState(0).randint(0, 38, (3, 9))
    tokens[:, 0] = 38
    for row, end in enumerate((8, 4, 1)):
        tokens[row, end:] = 39
    with torch.no_grad():
        found = model(torch.from_numpy(tokens))
    arrays = {
        "in/tokens": tokens.astype(np.int32),
        "out/tokens": found.last_hidden_state.numpy(),
    }
    if projection:
        arrays["out/projected"] = found.text_embeds.numpy()
    else:
        arrays["out/pooled"] = found.pooler_output.numpy()
    return shapes, arrays


def openai_shapes() -> Shapes:
    """Names and shapes of `clip.model.CLIP` (OpenAI), but for its image encoder."""
    shapes: Shapes = {
        "token_embedding.weight": (40, 128),
        "positional_embedding": (9, 128),
        "text_projection": (128, 48),
        "ln_final.weight": (128,),
        "ln_final.bias": (128,),
        "logit_scale": (),
        "visual.conv1.weight": (128, 3, 4, 4),
    }
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        linears = {"attn.in_proj_": (384, 128), "attn.out_proj.": (128, 128)}
        linears |= {"mlp.c_fc.": (192, 128), "mlp.c_proj.": (128, 192)}
        linears |= {"ln_1.": (128,), "ln_2.": (128,)}
        for name, shape in linears.items():
            shapes[f"{block}{name}weight"] = shape
            shapes[f"{block}{name}bias"] = shape[:1]
    return shapes


def bpe_case() -> dict[str, Any]:
    """CLIPTokenizer of transformers with a small vocabulary made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([text.lower() for text in TEXTS], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    reference = CLIPTokenizer(vocab=vocab, merges=merges)
    encoded = reference(TEXTS, padding="max_length", max_length=24, truncation=True)
    plain = reference(TEXTS, add_special_tokens=False)["input_ids"]
    return {
        "merges": merges,
        "texts": TEXTS,
        "ids": plain,
        "rows": encoded["input_ids"],
        "decoded": [reference.decode(ids) for ids in plain],
    }


TEXTS = [
    "a photo of a transformer",
    "",
    "   ",
    "A photo of a CAT, isn't it? They're here; we've gone: I'm, he'll, she'd",
    "ΟΔΟΣ Σίσυφος, İstanbul ıi",
    "naïve café e\u0301 cafe\u0301 a\u0308 \u0308",
    "Ǆ ǅ ß ẞ ﬁ Ⓐ 𝒜𝓁𝓅𝒽𝒶 𝟘𝟙",
    "日本語のテキスト 東京123 一二三 한국어 문장",
    "العربية עברית हिन्दी में पाठ ไทย",
    "emoji 😀👍🏽 👨‍👩‍👧‍👦 🇩🇪!",
    "1234567890 3.14159 1e-5 ½ ² Ⅷ ४२",
    "tabs\tand\nnew\r\nlines\u00a0no-break\u3000ideographic\u2028line",
    "x\x1cy\x1fz\x00w\x7f zero\u200bwidth\u200djoin\ufeff",
    "`code` {a:b} [c] <d> http://x.y/z?q=1&r=2#s",
    "don't can't 's 't ''s \"'s re're ’s “quoted”",
    "<|endoftext|> in text <|startoftext|>x a<|endoftext|>b",
    "snake_case __init__ CamelCase !!!???...---===",
    "$100 €50 ¥7 100% #hash @user",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "a long caption that goes on and on " * 4,
]

CASES = {
    "vae_diffusers": lambda: vae_case((32, 64, 64), 1, 16, "diffusers"),
    "vae_compvis": lambda: vae_case((32, 64, 64), 1, 16, "compvis"),
    "dinov2_transformers": lambda: dinov2_case(0, "transformers", (12, 28)),
    "dinov2_facebook": lambda: dinov2_case(0, "facebook", (12, 28)),
    "dinov2_registers": lambda: dinov2_case(4, "transformers", (12, 28)),
    "dinov2_registers_facebook": lambda: dinov2_case(4, "facebook", (20, 20)),
    "clip_transformers": lambda: clip_case("transformers", "quick_gelu", False),
    "clip_openai": lambda: clip_case("openai", "gelu", True),
    "clip_projection": lambda: clip_case("transformers", "quick_gelu", True),
}


def main(folder: pathlib.Path) -> None:
    """Writes every case."""
    for name, make in CASES.items():
        shapes, arrays = make()
        path = folder / f"{name}.npz"
        np.savez_compressed(path, shapes=json.dumps(shapes), **arrays)
        print(f"{path}: {path.stat().st_size} bytes")
    path = folder / "clip_bpe.json"
    path.write_text(json.dumps(bpe_case()), encoding="ascii")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
