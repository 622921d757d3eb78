"""open_clip: what its configuration says is what is computed. Its documented forward is written out here."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, normal
from PIL import Image
from safetensors.torch import save_file

import madtp
from madtp import CheckpointError
from madtp.weights.key_maps import open_clip

WIDTH, SIZE, PATCH, OUT, CONTEXT, WORDS = 64, 32, 8, 24, 10, 50
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 2, "head_width": 16}
TEXT = {"context_length": CONTEXT, "vocab_size": WORDS, "width": 48, "heads": 3, "layers": 2}
PLAIN = {"embed_dim": OUT, "vision_cfg": VISION, "text_cfg": TEXT}
CLIPA = {
    "embed_dim": OUT, "vision_cfg": VISION | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
}  # fmt: skip
SIGLIP = {
    "embed_dim": WIDTH, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {
        "image_size": SIZE, "timm_model_name": "vit_base_patch8_siglip_32", "timm_model_pretrained": False,
        "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": TEXT | {
        "width": WIDTH, "heads": 4, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
        "tokenizer_kwargs": {"clean": "canonicalize"},
    },
}  # fmt: skip


def weights(model, generator):
    """A state dict as open_clip saves it."""
    state = {}

    def put(name, *shape, scale=None):
        state[name] = normal(generator, *shape).cpu() * (scale or shape[-1] ** -0.5)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * normal(generator, width).cpu()
        put(f"{name}.bias", width, scale=0.1)

    def linear(name, inside, outside):
        put(f"{name}.weight", outside, inside)
        put(f"{name}.bias", outside, scale=0.1)

    def blocks(lead, width, layers):
        for number in range(layers):
            block = f"{lead}.resblocks.{number}"
            norm(f"{block}.ln_1", width)
            put(f"{block}.attn.in_proj_weight", 3 * width, width, scale=1.5 * width**-0.5)
            put(f"{block}.attn.in_proj_bias", 3 * width, scale=0.1)
            linear(f"{block}.attn.out_proj", width, width)
            norm(f"{block}.ln_2", width)
            linear(f"{block}.mlp.c_fc", width, 4 * width)
            linear(f"{block}.mlp.c_proj", 4 * width, width)

    text, lead = model["text_cfg"], "text." if model.get("custom_text") else ""
    grid = (SIZE // PATCH) ** 2
    if "timm_model_name" in model["vision_cfg"]:
        trunk = "visual.trunk"
        put(f"{trunk}.pos_embed", 1, grid, WIDTH, scale=0.3)
        put(f"{trunk}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH, scale=0.05)
        put(f"{trunk}.patch_embed.proj.bias", WIDTH, scale=0.1)
        for number in range(2):
            block = f"{trunk}.blocks.{number}"
            norm(f"{block}.norm1", WIDTH)
            linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
            linear(f"{block}.attn.proj", WIDTH, WIDTH)
            norm(f"{block}.norm2", WIDTH)
            linear(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH)
            linear(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
        norm(f"{trunk}.norm", WIDTH)
        put(f"{trunk}.attn_pool.latent", 1, 1, WIDTH)
        linear(f"{trunk}.attn_pool.q", WIDTH, WIDTH)
        linear(f"{trunk}.attn_pool.kv", WIDTH, 2 * WIDTH)
        linear(f"{trunk}.attn_pool.proj", WIDTH, WIDTH)
        norm(f"{trunk}.attn_pool.norm", WIDTH)
        linear(f"{trunk}.attn_pool.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"{trunk}.attn_pool.mlp.fc2", 4 * WIDTH, WIDTH)
    else:
        put("visual.class_embedding", WIDTH, scale=0.5)
        put("visual.positional_embedding", grid + 1, WIDTH, scale=0.3)
        put("visual.conv1.weight", WIDTH, 3, PATCH, PATCH, scale=0.05)
        if not model["vision_cfg"].get("no_ln_pre"):
            norm("visual.ln_pre", WIDTH)
        blocks("visual.transformer", WIDTH, 2)
        norm("visual.ln_post", WIDTH)
        put("visual.proj", WIDTH, OUT)
    put(f"{lead}token_embedding.weight", WORDS, text["width"], scale=0.5)
    put(f"{lead}positional_embedding", CONTEXT, text["width"], scale=0.3)
    blocks(f"{lead}transformer", text["width"], 2)
    norm(f"{lead}ln_final", text["width"])
    if text.get("proj_bias"):
        linear(f"{lead}text_projection", text["width"], model["embed_dim"])
        state["logit_bias"] = torch.tensor(-10.0)
    else:
        put(f"{lead}text_projection", text["width"], model["embed_dim"])
    state["logit_scale"] = torch.tensor(2.6593)
    return state


def activation(model, section):
    if model.get("quick_gelu"):
        return lambda x: x * torch.sigmoid(1.702 * x)
    approximate = (model[section].get("act_kwargs") or {}).get("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def attend(x, state, names, heads, mask=None):
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in F.linear(x, state[names[0]], state[names[1]]).chunk(3, -1)
    )
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def transformer(x, state, lead, heads, act, eps, causal=False):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1) if causal else None
    for number in range(2):
        b = f"{lead}.{number}"
        if f"{b}.ln_1.weight" in state:
            names = (
                "ln_1",
                ("attn.in_proj_weight", "attn.in_proj_bias"),
                "attn.out_proj",
                "ln_2",
                "mlp.c_fc",
                "mlp.c_proj",
            )
        else:
            names = ("norm1", ("attn.qkv.weight", "attn.qkv.bias"), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        first, qkv, out, second, into, back = names
        x = x + linear(
            attend(norm(x, f"{b}.{first}"), state, [f"{b}.{name}" for name in qkv], heads, mask), f"{b}.{out}"
        )
        x = x + linear(act(linear(norm(x, f"{b}.{second}"), f"{b}.{into}")), f"{b}.{back}")
    return x


def encode_image(state, model, pixels):
    vision = model["vision_cfg"]
    state = {key: value.double() for key, value in state.items()}
    pixels = pixels.double()

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    if "timm_model_name" in vision:
        t = "visual.trunk"
        weight, bias = state[f"{t}.patch_embed.proj.weight"], state[f"{t}.patch_embed.proj.bias"]
        x = F.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).mT + state[f"{t}.pos_embed"]
        x = norm(transformer(x, state, f"{t}.blocks", 1, F.gelu, 1e-6), f"{t}.norm", 1e-6)  # one head of 64
        p = f"{t}.attn_pool"
        q = F.linear(state[f"{p}.latent"], state[f"{p}.q.weight"], state[f"{p}.q.bias"])
        k, v = F.linear(x, state[f"{p}.kv.weight"], state[f"{p}.kv.bias"]).chunk(2, -1)
        x = (q @ k.mT * WIDTH**-0.5).softmax(-1) @ v
        x = F.linear(x, state[f"{p}.proj.weight"], state[f"{p}.proj.bias"])
        y = F.gelu(F.linear(norm(x, f"{p}.norm", 1e-6), state[f"{p}.mlp.fc1.weight"], state[f"{p}.mlp.fc1.bias"]))
        return (x + F.linear(y, state[f"{p}.mlp.fc2.weight"], state[f"{p}.mlp.fc2.bias"]))[:, 0]
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = x if vision.get("no_ln_pre") else norm(x, "visual.ln_pre")
    heads = WIDTH // vision["head_width"]
    x = transformer(x, state, "visual.transformer.resblocks", heads, activation(model, "vision_cfg"), 1e-5)
    if vision.get("pool_type") == "avg":
        x = (
            norm(x[:, 1:].mean(1), "visual.ln_post")
            if vision.get("final_ln_after_pool")
            else norm(x, "visual.ln_post")[:, 1:].mean(1)
        )
    else:
        x = norm(x[:, 0], "visual.ln_post")
    return x @ state["visual.proj"]


def encode_text(state, model, ids):
    text = model["text_cfg"]
    state = {key.removeprefix("text."): value.double() for key, value in state.items()}
    eps = (text.get("norm_kwargs") or {}).get("eps", 1e-5)
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    causal = not text.get("no_causal_mask")
    x = transformer(x, state, "transformer.resblocks", text["heads"], activation(model, "text_cfg"), eps, causal)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"], eps)
    x = x[torch.arange(len(x)), ids.argmax(-1)] if text.get("pool_type", "argmax") == "argmax" else x[:, -1]
    if "text_projection.weight" in state:
        return F.linear(x, state["text_projection.weight"], state["text_projection.bias"])
    return x @ state["text_projection"]


def write(place, model, state, preprocess=None):
    save_file(state, place / "open_clip_model.safetensors")
    settings = {"model_cfg": model} | ({} if preprocess is None else {"preprocess_cfg": preprocess})
    (place / "open_clip_config.json").write_text(json.dumps(settings))
    return place


def close(ours, expected):
    difference = (ours.double().cpu() - expected).abs().max()
    assert difference < 1e-5 * max(1, expected.abs().max()), difference


@pytest.mark.parametrize(
    "model",
    [PLAIN, PLAIN | {"quick_gelu": True}, PLAIN | {"custom_text": True}, CLIPA, SIGLIP],
    ids=["gelu", "quick_gelu", "custom text", "CLIPA", "SigLIP with timm"],
)
@torch.inference_mode()
def test_features_are_those_of_the_documented_forward(model, generator, tmp_path):
    state = weights(model, generator)
    ours = madtp.load(write(tmp_path, model, state), device=DEVICE)
    pixels = normal(generator, 3, 3, SIZE, SIZE)
    close(ours.encode_image(pixels).features, encode_image(state, model, pixels.cpu()))
    padded = torch.randint(1, WORDS - 1, (4, CONTEXT), generator=generator)
    if ours.config.text.padded:
        texts = list(padded)
    else:
        ends = [3, 9, 5, 7]
        for row, end in zip(padded, ends, strict=True):
            row[end], row[end + 1 :] = WORDS - 1, 0
        texts = [row[: end + 1] for row, end in zip(padded, ends, strict=True)]
    close(ours.encode_text(texts).features, encode_text(state, model, padded))
    back = open_clip.from_ours(ours.state_dict())
    lead = "" if model is SIGLIP or not model.get("custom_text") else "text."  # plain names serve both
    expected = {key.removeprefix(lead) if lead else key: value for key, value in state.items()}
    assert back.keys() == expected.keys()
    assert all(torch.equal(value.cpu(), expected[key]) for key, value in back.items())


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@torch.inference_mode()
def test_a_bare_state_dict_is_asked_for_its_activation(hidden_act, generator, tmp_path):
    """LAION's and OpenAI's weights have the same names; running one with the other's activation is an error of 15 %, silently."""
    model = PLAIN | {"quick_gelu": hidden_act == "quick_gelu", "vision_cfg": VISION | {"head_width": 64}}
    model["text_cfg"] = TEXT | {"width": 64, "heads": 1}
    state = weights(model, generator)
    torch.save(state, tmp_path / "epoch_32.pt")
    for source in (state, tmp_path / "epoch_32.pt"):
        with pytest.raises(CheckpointError, match="do not tell the activation of its MLPs: give hidden_act"):
            madtp.load(source)
        ours, pixels = madtp.load(source, hidden_act=hidden_act, device=DEVICE), normal(generator, 2, 3, SIZE, SIZE)
        close(ours.encode_image(pixels).features, encode_image(state, model, pixels.cpu()))
    place = write(tmp_path, model, state)
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[hidden_act]
    with pytest.raises(ValueError, match=f"hidden_act: .* says '{hidden_act}', got '{other}'"):
        madtp.load(place, hidden_act=other)
    assert madtp.load(place, hidden_act=hidden_act).config.hidden_act == hidden_act
    assert madtp.load(state | {"input_resolution": torch.tensor(SIZE)}).config.hidden_act == "quick_gelu", (
        "OpenAI's archive"
    )


def test_weights_that_were_never_float16_are_not_rounded(generator, tmp_path):
    state = weights(PLAIN, generator)
    ours = madtp.load(write(tmp_path, PLAIN, state)).state_dict()
    assert torch.equal(ours["visual.proj.weight"], state["visual.proj"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": VISION | {"layers": [3, 4, 6, 3]}}, "the image tower is a ResNet"),
        (
            {"vision_cfg": VISION | {"attentional_pool": True}},
            "vision_cfg.attentional_pool: not supported here, got True",
        ),
        ({"vision_cfg": VISION | {"qk_norm": True}}, "vision_cfg.qk_norm: not supported here"),
        ({"vision_cfg": VISION | {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value: not supported here"),
        ({"vision_cfg": VISION | {"timm_model_name": "convnext_base"}}, "timm only SigLIP's .* got 'convnext_base'"),
        ({"text_cfg": TEXT | {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name: not supported here"),
        (
            {"text_cfg": TEXT | {"tokenizer_kwargs": {"strip_sep_token": True}}},
            "text_cfg.tokenizer_kwargs: not supported",
        ),
        ({"text_cfg": TEXT | {"pool_type": "last"}}, "pool_type 'last' together with no_causal_mask"),
        ({"multimodal_cfg": {"width": 8}}, "model_cfg.multimodal_cfg: not supported here"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message, generator, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        madtp.load(write(tmp_path, PLAIN | change, weights(PLAIN, generator)))


def picture(width, height):
    x, y = torch.meshgrid(torch.linspace(0, 1, width), torch.linspace(0, 1, height), indexing="xy")
    values = torch.stack([x, y, (6 * x + 9 * y).sin() / 2 + 0.5], -1)
    return Image.fromarray((values * 255).byte().numpy())


@pytest.mark.parametrize("size", [(64, 36), (36, 64), (97, 100), (33, 200)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_follow_the_configuration(mode, size, generator, tmp_path):
    """As torchvision's Resize, CenterCrop, ToTensor and Normalize make them, which open_clip uses."""
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    preprocess = {"mean": mean, "std": std, "interpolation": "bilinear", "resize_mode": mode}
    ours = madtp.load(write(tmp_path, PLAIN, weights(PLAIN, generator), preprocess)).processor
    image = picture(*size)
    if mode == "squash":
        resized = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    else:
        short, long = sorted(size)
        scaled = int(SIZE * long / short)
        resized = image.resize((SIZE, scaled) if size[0] <= size[1] else (scaled, SIZE), Image.Resampling.BILINEAR)
        left, top = (round((side - SIZE) / 2.0) for side in resized.size)
        resized = resized.crop((left, top, left + SIZE, top + SIZE))
    raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
    expected = (raw.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert (ours.image(image) - expected).abs().max() < 1e-6
    madtp.save_pretrained(madtp.load(tmp_path), tmp_path / "saved")
    assert torch.equal(madtp.load(tmp_path / "saved").processor.image(image), ours.image(image))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "longest"}, "resize_mode: expected 'shortest' or 'squash', got 'longest'"),
        ({"interpolation": "random"}, "interpolation: expected 'bicubic' or 'bilinear', got 'random'"),
        ({"mean": [0.5]}, "mean: expected three numbers"),
        ({"fill_color": 255}, "preprocess_cfg.fill_color: expected 0, got 255"),
        ({"sharpen": True}, "preprocess_cfg: unknown settings sharpen"),
    ],
)
def test_settings_of_pixels_that_are_refused(change, message, generator, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        madtp.load(write(tmp_path, PLAIN, weights(PLAIN, generator), change))
